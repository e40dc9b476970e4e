/* Emulated wide-area links between network namespaces: rate, delay, loss, and a queue that drops at its tail.

   wide_area (RATE_BITS_PER_S DELAY_NS LOSS_PPM QUEUE_BYTES SEED)...

   Makes a near namespace and for each link a far one, with a TUN device at either end of link I, 10.99.I.1 and
   10.99.I.2, prints "PID FD FD..." (the namespaces, near first, as descriptors of this process), then carries packets
   both ways until standard input ends. Each direction is a router's port: a packet leaves when those before it have left
   at the link's rate, and arrives DELAY_NS later; one that finds more than QUEUE_BYTES waiting is dropped, and of the
   rest LOSS_PPM in a million.

   The kernel hands over TCP's segments many at a time, as it does to a network card that cuts them itself (TSO), and
   takes them back as from one that joins them (GRO): a system call a packet would need more than a core at 1 Gbit/s.
   Here each segment still counts, is dropped and is on time for itself; they travel joined for TRAIN_NS of the line at
   most. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/ip.h>
#include <linux/tcp.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
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
#define TRAIN_NS 500000
#define FIGURES 5
#define MOST_LINKS 4

typedef struct virtio_net_hdr offload; /* before each packet: what the kernel left to the card */

struct packet {
    int64_t due_ns;
    int size;
    char data[]; /* an offload, and the packet */
};

struct link {
    double ns_per_byte;
    int64_t delay_ns, queue_bytes;
    uint32_t loss_ppm;
    uint64_t random_state;
};

/* A packet as it was read: segments of TCP that share their headers, or a single one. */
struct burst {
    char *data;
    int size, headers, step, count; /* bytes in all, of the headers, of a segment's data; segments */
};

struct direction {
    int from, to;
    struct link *link;
    int64_t free_ns; /* when the port has sent all that waits */
    unsigned head, tail;
    struct packet *held[SLOTS];
};

static struct link links[MOST_LINKS];
static struct direction ways[2 * MOST_LINKS];

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static uint32_t draw(struct link *l) { /* xorshift64* */
    l->random_state ^= l->random_state >> 12;
    l->random_state ^= l->random_state << 25;
    l->random_state ^= l->random_state >> 27;
    return (uint32_t)((l->random_state * 2685821657736338717ULL) >> 32);
}

static int tun(int number, int end) {
    char address[32];
    struct ifreq request;
    struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
    int header = sizeof(offload);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) die("/dev/net/tun");
    memset(&request, 0, sizeof request);
    snprintf(address, sizeof address, "10.99.%d.%d", number, end);
    snprintf(request.ifr_name, sizeof request.ifr_name, "wan%d", number);
    request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
    if (ioctl(fd, TUNSETIFF, &request)) die("TUNSETIFF");
    if (ioctl(fd, TUNSETVNETHDRSZ, &header)) die("TUNSETVNETHDRSZ");
    if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)) die("TUNSETOFFLOAD");
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

static uint32_t add(uint32_t sum, const void *data, int size) { /* RFC 1071, without the last complement */
    const unsigned char *at = data;
    for (; size > 1; size -= 2, at += 2) sum += (uint32_t)at[0] << 8 | at[1];
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

static struct burst burst_of(char *data, int size) {
    offload *card = (offload *)data;
    struct iphdr *ip = (struct iphdr *)(card + 1);
    struct burst whole = {data, size - (int)sizeof *card, 0, size, 1};
    if ((card->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) != VIRTIO_NET_HDR_GSO_TCPV4 || whole.size < 40) return whole;
    struct tcphdr *tcp = (struct tcphdr *)((char *)ip + ip->ihl * 4);
    whole.headers = ip->ihl * 4 + tcp->doff * 4;
    whole.step = card->gso_size;
    whole.count = (whole.size - whole.headers + whole.step - 1) / whole.step;
    return whole;
}

static int wire_bytes(struct burst *b, int segment) {
    if (b->count == 1) return b->size;
    int rest = b->size - b->headers - segment * b->step;
    return b->headers + (rest < b->step ? rest : b->step);
}

/* The segments from `first` to before `end`, as one packet with headers of its own. */
static struct packet *part(struct burst *b, int first, int end) {
    int at = first * b->step, size = b->size;
    if (b->count > 1) {
        int data = b->size - b->headers - at;
        if (end < b->count) data = (end - first) * b->step;
        size = b->headers + data;
    }
    struct packet *p = malloc(sizeof *p + sizeof(offload) + size);
    if (!p) return NULL;
    p->size = (int)sizeof(offload) + size;
    if (b->count == 1) {
        memcpy(p->data, b->data, p->size);
        return p;
    }
    memcpy(p->data, b->data, sizeof(offload) + b->headers);
    memcpy(p->data + sizeof(offload) + b->headers, b->data + sizeof(offload) + b->headers + at, size - b->headers);
    offload *card = (offload *)p->data;
    struct iphdr *ip = (struct iphdr *)(card + 1);
    int ip_bytes = ip->ihl * 4;
    struct tcphdr *tcp = (struct tcphdr *)((char *)ip + ip_bytes);
    ip->tot_len = htons(size);
    ip->id = htons(ntohs(ip->id) + first);
    ip->check = 0;
    ip->check = htons(~add(0, ip, ip_bytes));
    tcp->seq = htonl(ntohl(tcp->seq) + at);
    if (first > 0) tcp->cwr = 0;
    if (end < b->count) tcp->fin = tcp->psh = 0;
    if (end - first == 1) card->gso_type = VIRTIO_NET_HDR_GSO_NONE, card->gso_size = 0;
    /* What is left to the card is the sum over the packet; what it starts from is the sum over the pseudo-header. */
    uint16_t pseudo[2] = {htons(IPPROTO_TCP), htons(size - ip_bytes)};
    tcp->check = htons(add(add(0, &ip->saddr, 8), pseudo, sizeof pseudo));
    card->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    card->csum_start = ip_bytes;
    card->csum_offset = offsetof(struct tcphdr, check);
    return p;
}

static void hold(struct direction *d, struct burst *b, int first, int end) {
    if (first == end || d->head - d->tail == SLOTS) return;
    struct packet *p = part(b, first, end);
    if (!p) return;
    p->due_ns = d->free_ns + d->link->delay_ns;
    d->held[d->head++ % SLOTS] = p;
}

static int take(struct direction *d) {
    static char data[sizeof(offload) + 65536];
    struct link *l = d->link;
    int taken = 0;
    for (; taken < BURST; taken++) {
        ssize_t size = read(d->from, data, sizeof data);
        if (size <= (ssize_t)sizeof(offload)) break;
        struct burst b = burst_of(data, (int)size);
        int64_t now = now_ns();
        if (d->free_ns < now) d->free_ns = now;
        int first = 0; /* of those that travel on together */
        int64_t began = d->free_ns;
        for (int i = 0; i < b.count; i++) {
            int bytes = wire_bytes(&b, i);
            int full = (d->free_ns - now) / l->ns_per_byte > l->queue_bytes, lost = 0;
            if (!full) lost = draw(l) % 1000000 < l->loss_ppm;
            if (full || lost || d->free_ns - began > TRAIN_NS) {
                hold(d, &b, first, i);
                first = full || lost ? i + 1 : i;
                began = d->free_ns;
            }
            if (!full) d->free_ns += (int64_t)(bytes * l->ns_per_byte);
        }
        hold(d, &b, first, b.count);
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
    struct pollfd watched[2 * MOST_LINKS + 1];
    int number = (count - 1) / FIGURES, ends = 2 * number, spaces[MOST_LINKS + 1];
    if (number < 1 || number > MOST_LINKS || count != 1 + number * FIGURES) return 2;
    prctl(PR_SET_TIMERSLACK, 1000);
    setpriority(PRIO_PROCESS, 0, -10); /* a link is not slowed by who computes; without the right to it, it may be */
    spaces[0] = space();
    for (int i = 0; i < number; i++) ways[2 * i].from = ways[2 * i + 1].to = tun(i, 1);
    for (int i = 0; i < number; i++) {
        char **figure = given + 1 + i * FIGURES;
        struct link *l = &links[i];
        l->ns_per_byte = 8e9 / strtod(figure[0], NULL);
        l->delay_ns = atoll(figure[1]);
        l->loss_ppm = (uint32_t)atoll(figure[2]);
        l->queue_bytes = atoll(figure[3]);
        l->random_state = 0x9E3779B97F4A7C15ULL ^ (uint64_t)atoll(figure[4]);
        spaces[i + 1] = space();
        ways[2 * i].to = ways[2 * i + 1].from = tun(i, 2);
        ways[2 * i].link = ways[2 * i + 1].link = l;
    }
    printf("%d", (int)getpid());
    for (int i = 0; i <= number; i++) printf(" %d", spaces[i]);
    printf("\n");
    fflush(stdout);
    for (int i = 0; i < ends; i++) watched[i] = (struct pollfd){ways[i].from, POLLIN, 0};
    watched[ends] = (struct pollfd){0, POLLIN, 0};
    for (;;) {
        struct timespec wait = {0, 50000000};
        int64_t due = INT64_MAX, now = now_ns();
        for (int i = 0; i < ends; i++) {
            struct direction *d = &ways[i];
            if (d->head != d->tail && d->held[d->tail % SLOTS]->due_ns < due) due = d->held[d->tail % SLOTS]->due_ns;
        }
        if (due != INT64_MAX) {
            int64_t left = due > now ? due - now : 0;
            if (left < wait.tv_nsec) wait.tv_nsec = left;
        }
        if (ppoll(watched, ends + 1, &wait, NULL) < 0 && errno != EINTR) die("ppoll");
        if (watched[ends].revents) return 0; /* whoever started us is done, or dead */
        for (int i = 0; i < ends; i++) take(&ways[i]);
        for (int i = 0; i < ends; i++) give(&ways[i]);
    }
}
