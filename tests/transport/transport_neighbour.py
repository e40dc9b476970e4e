"""A neighbour in a process of its own: `python transport_neighbour.py BACKEND MODE`, with a channel's address
on standard input and the key's hex behind it."""

from __future__ import annotations

import sys
import time

from transport import ChannelBroken, ChannelClosed, connect_channel, open_fabric


def main() -> None:
    backend, mode = sys.argv[1:]
    address, key = sys.stdin.readline().split()
    fabric = open_fabric(backend)
    channel = connect_channel(
        fabric, bytes.fromhex(address), name="parent", key=None if key == "-" else bytes.fromhex(key), hello=b"child"
    )
    try:
        if mode == "echo":
            while True:
                message = channel.receive(60)
                channel.send(message.meta, message.payload, kind=message.kind)
        elif mode.startswith("reduce"):
            serve_reduce(channel, beside=mode == "reduce-beside")
        elif mode in ("idle", "leave"):
            channel.send(b"ready")
            while not channel.established:  # nothing moves unless somebody drives the fabric
                fabric.wait(0.1)
                channel.poll()
            if mode == "idle":
                time.sleep(60)
            channel.close()
    except (ChannelClosed, ChannelBroken) as error:
        print(type(error).__name__, flush=True)
    fabric.close()


def serve_reduce(channel, *, beside) -> None:
    import torch

    from transport.collectives import Group

    torch.set_num_threads(1)
    group = Group(1, 2, {0: channel}, beside=beside)
    while True:
        message = channel.receive(60)
        count, dtype, rounds = message.meta.decode().split()
        tensor = torch.zeros(int(count), dtype=getattr(torch, dtype))
        for _ in range(int(rounds)):
            group.all_reduce_(tensor, 30)


if __name__ == "__main__":
    main()
