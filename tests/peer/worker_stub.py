"""A worker without torch, for the pool's tests: speaks the protocol, and misbehaves as its job's name says."""

from __future__ import annotations

import os
import sys
import time

from mesh.errors import ModelError
from mesh.runtime.protocol import (
    AliveEvent,
    Connect,
    Decoder,
    FailureEvent,
    Ping,
    Prepare,
    Progress,
    Release,
    Reply,
    Start,
    TokenEvent,
    encode,
)


def say(event) -> None:
    os.write(1, encode(event))


def main() -> None:
    job = sys.argv[1]
    decoder = Decoder.commands()
    while data := os.read(0, 65536):
        for command in decoder.feed(data):
            obey(job, command)


def obey(job: str, command) -> None:
    match command:
        case Prepare() if job == "bad-model":
            say(Reply.of_error(command.id, ModelError("there is no such model")))
        case Prepare() if job == "crash":
            raise ValueError("cannot load this")
        case Prepare() if job == "mute":
            time.sleep(60)
        case Prepare() if job == "nonsense":
            os.write(1, b"hello from a library")
        case Prepare():
            print("a library's chatter", file=sys.stderr)
            say(Progress(command.id, 5, 10))
            body = {"addresses": {name: f"{name} at {command.host}".encode() for name in command.backends}}
            say(Reply(command.id, body=body))
        case Connect():
            say(Reply(command.id))
            for neighbour in command.neighbours:
                say(FailureEvent(command.epoch, neighbour.name, repr(neighbour.delay_s), fatal=False))
        case Start():
            say(Reply(command.id))
            request = command.request
            for index in range(request.index, request.max_tokens):
                say(TokenEvent(command.epoch, request.request, index, index * 2, "", {"compute_s": 0.25}))
            say(AliveEvent(command.epoch, 7))
        case Ping():
            say(Reply(command.id, body={"pid": os.getpid()}))
        case Release() if job == "stubborn":
            time.sleep(60)
        case Release():
            say(Reply(command.id))
            sys.exit(0)
        case _:
            say(Reply(command.id))


main()
