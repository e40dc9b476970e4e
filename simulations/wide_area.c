/* An emulated wide-area link between two network namespaces: rate, delay, loss, and a queue that drops at its tail.

   wide_area RATE_BITS_PER_S DELAY_NS LOSS_PPM QUEUE_BYTES SEED

   Makes two namespaces with a TUN device each, 10.99.0.1 and 10.99.0.2, prints "PID FD FD" (the namespaces, as
   descriptors of this process), then carries packets both ways until standard input ends. Each direction is a router's
   port: a packet leaves when those before it have left at the link's rate, and arrives DELAY_NS later; one that finds
   more than QUEUE_BYTES waiting is dropped, and of the rest LOSS_PPM in a million. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define SLOTS (1u << 18)
#define BURST 64
#define MTU 1500

struct packet {
    int64_t due_ns;
    int size;
    char data[];
};

struct direction {
    int from, to;
    int64_t free_ns; /* when the port has sent all that waits */
    unsigned head, tail;
    struct packet *held[SLOTS];
};

static double ns_per_byte;
static int64_t delay_ns, queue_bytes;
static uint32_t loss_ppm;
static uint64_t random_state;

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static uint32_t draw(void) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 2685821657736338717ULL) >> 32);
}

static int tun(const char *address) {
    struct ifreq request;
    struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) die("/dev/net/tun");
    memset(&request, 0, sizeof request);
    strcpy(request.ifr_name, "wan0");
    request.ifr_flags = IFF_TUN | IFF_NO_PI | 0x10;
    if (ioctl(fd, TUNSETIFF, &request)) die("TUNSETIFF");
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (control < 0) die("socket");
    in->sin_family = AF_INET;
    inet_pton(AF_INET, address, &in->sin_addr);
    if (ioctl(control, SIOCSIFADDR, &request)) die("SIOCSIFADDR");
    inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
    if (ioctl(control, SIOCSIFNETMASK, &request)) die("SIOCSIFNETMASK");
    request.ifr_mtu = MTU;
    if (ioctl(control, SIOCSIFMTU, &request)) die("SIOCSIFMTU");
    request.ifr_qlen = 4000;
    if (ioctl(control, SIOCSIFTXQLEN, &request)) die("SIOCSIFTXQLEN");
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(control, SIOCSIFFLAGS, &request)) die("SIOCSIFFLAGS");
    strcpy(request.ifr_name, "lo");
    if (ioctl(control, SIOCSIFFLAGS, &request)) die("lo");
    close(control);
    return fd;
}

static int space(void) {
    if (unshare(CLONE_NEWNET)) die("unshare");
    int fd = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (fd < 0) die("/proc/self/ns/net");
    return fd;
}

static int take(struct direction *d) {
    static char data[65536];
    int taken = 0;
    for (; taken < BURST; taken++) {
        ssize_t size = read(d->from, data, sizeof data);
        if (size <= 0) break;
        int64_t now = now_ns();
        if (d->free_ns < now) d->free_ns = now;
        if ((d->free_ns - now) / ns_per_byte > queue_bytes || d->head - d->tail == SLOTS) continue;
        d->free_ns += (int64_t)(size * ns_per_byte);
        if (draw() % 1000000 < loss_ppm) continue;
        struct packet *p = malloc(sizeof *p + size);
        if (!p) continue;
        p->due_ns = d->free_ns + delay_ns;
        p->size = (int)size;
        memcpy(p->data, data, size);
        d->held[d->head++ % SLOTS] = p;
    }
    return taken;
}

static void give(struct direction *d) {
    int64_t now = now_ns();
    while (d->head != d->tail) {
        struct packet *p = d->held[d->tail % SLOTS];
        if (p->due_ns > now) break;
        if (write(d->to, p->data, p->size) < 0 && errno == EAGAIN) break;
        d->tail++;
        free(p);
    }
}

int main(int count, char **given) {
    static struct direction there, back;
    if (count != 6) return 2;
    ns_per_byte = 8e9 / strtod(given[1], NULL);
    delay_ns = atoll(given[2]);
    loss_ppm = (uint32_t)atoll(given[3]);
    queue_bytes = atoll(given[4]);
    random_state = 0x9E3779B97F4A7C15ULL ^ (uint64_t)atoll(given[5]);
    prctl(PR_SET_TIMERSLACK, 1000);
    setpriority(PRIO_PROCESS, 0, -10); /* a link is not slowed by who computes; without the right to it, it may be */
    int near_space = space(), near = tun("10.99.0.1");
    int far_space = space(), far = tun("10.99.0.2");
    there.from = back.to = near;
    there.to = back.from = far;
    printf("%d %d %d\n", (int)getpid(), near_space, far_space);
    fflush(stdout);
    for (;;) {
        struct pollfd watched[3] = {{near, POLLIN, 0}, {far, POLLIN, 0}, {0, POLLIN, 0}};
        struct timespec wait = {0, 50000000};
        int64_t due = INT64_MAX, now = now_ns();
        if (there.head != there.tail) due = there.held[there.tail % SLOTS]->due_ns;
        if (back.head != back.tail && back.held[back.tail % SLOTS]->due_ns < due)
            due = back.held[back.tail % SLOTS]->due_ns;
        if (due != INT64_MAX) {
            int64_t left = due > now ? due - now : 0;
            if (left < wait.tv_nsec) wait.tv_nsec = left;
        }
        if (ppoll(watched, 3, &wait, NULL) < 0 && errno != EINTR) die("ppoll");
        if (watched[2].revents) return 0; /* whoever started us is done, or dead */
        take(&there);
        take(&back);
        give(&there);
        give(&back);
    }
}
