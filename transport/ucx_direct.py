"""UCP's tagged messages, called directly: of the hot path nothing goes through UCXX.

A send takes 3.5 us through UCXX's binding (0.52) and 0.75 us here, posting a receive 1.7 and 0.85 us. And a request
that UCXX knows holds its endpoint and, through that, the worker: one that never ends keeps the worker's descriptors
open for ever. Here a request is a number that whoever posted it gives back.

UCXX still makes contexts, workers and endpoints, and tells their handles. The calls are those of ucp.h (UCX 1.11 and
later); `ucp_request_param_t` has a mask of its fields and promises to stay compatible by it. They keep the interpreter
lock: handing it over would cost as much as most of them take. The longest copies a message below the rendezvous
threshold.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from transport.base import MAX_MESSAGE_BYTES, TransportError
from transport.ucx_binding import ucx as _  # noqa: F401  (loads the library)

_PTR, _SIZE, _TAG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
try:
    _library: Any = ctypes.PyDLL("libucp.so.0")  # the one that UCXX has loaded
except OSError as error:
    raise ImportError(f"UCX's library cannot be called: {error}") from None


def _call(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, _library))


#: tag_send(endpoint, data, size, tag, memory): None when it has left already, else a request or an error.
tag_send = _call("ucp_tag_send_nbx", _PTR, _PTR, _PTR, _SIZE, _TAG, _PTR)
#: tag_recv(worker, address, size, tag, TAG_FULL, memory): None when it is there already, else a request or an error.
tag_recv = _call("ucp_tag_recv_nbx", _PTR, _PTR, _PTR, _SIZE, _TAG, _TAG, _PTR)
#: check_status(request): IN_PROGRESS, 0, or an error below 0.
check_status = _call("ucp_request_check_status", ctypes.c_byte, _PTR)
#: request_free(request): afterwards the number means nothing.
request_free = _call("ucp_request_free", None, _PTR)
_request_cancel = _call("ucp_request_cancel", None, _PTR, _PTR)
_probe = _call("ucp_tag_probe_nb", _PTR, _PTR, _TAG, _TAG, ctypes.c_int, _PTR)
_receive_probed = _call("ucp_tag_msg_recv_nbx", _PTR, _PTR, _PTR, _SIZE, _PTR, _PTR)
_status_string = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.c_byte)(("ucs_status_string", ctypes.PyDLL("libucs.so.0")))

IN_PROGRESS: Final = 1
CANCELED: Final = -16
TAG_FULL: Final = (1 << 64) - 1
#: What a call returns from here on is an error, a small negative number taken for a pointer (UCS_PTR_IS_ERR).
ERRORS: Final = (1 << 64) - 100

_FIELD_MEMORY_TYPE = 1 << 6
_HOST_MEMORY, _CUDA_MEMORY = 0, 1


class _Parameters(ctypes.Structure):
    """ucp_request_param_t."""

    _fields_ = (
        ("op_attr_mask", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("request", _PTR),
        ("callback", _PTR),
        ("datatype", ctypes.c_uint64),
        ("user_data", _PTR),
        ("reply_buffer", _PTR),
        ("memory_type", ctypes.c_int),
        ("recv_info", _PTR),
        ("memh", _PTR),
    )


class _Probed(ctypes.Structure):
    """ucp_tag_recv_info_t."""

    _fields_ = (("sender_tag", ctypes.c_uint64), ("length", _SIZE))


_host = _Parameters(op_attr_mask=_FIELD_MEMORY_TYPE, memory_type=_HOST_MEMORY)
_cuda = _Parameters(op_attr_mask=_FIELD_MEMORY_TYPE, memory_type=_CUDA_MEMORY)
#: Where a buffer lies. Saying it saves UCX a look-up.
HOST: Final = ctypes.addressof(_host)
CUDA: Final = ctypes.addressof(_cuda)


class UcxFailure(TransportError):
    """A message failed in UCX. `status`: UCX's, below 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status_text(status))
        self.status = status


def status_text(status: int) -> str:
    """UCX's words for a status."""
    text: bytes = _status_string(status)
    return text.decode(errors="replace")


def address_of(view: memoryview) -> int:
    """Where a contiguous view of bytes lies; it has to be kept as long as the number is used."""
    if view.readonly:
        return int(np.frombuffer(view, np.uint8).ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Transfer:
    """A request on its way and what it needs: `kept` is held until it has completed."""

    __slots__ = ("_request", "kept", "nbytes", "status")

    def __init__(self, request: int | None, kept: object, nbytes: int) -> None:
        """request: what `tag_send` or `tag_recv` gave."""
        self.nbytes = nbytes
        self.status = 0
        self._request = request or 0
        self.kept: object = kept if self._request else None
        if self._request >= ERRORS:
            self._end(self._request - (1 << 64))

    @property
    def completed(self) -> bool:
        """True when UCX needs the buffer no more; `status` then tells how it went."""
        if self._request:
            status = check_status(self._request)
            if status == IN_PROGRESS:
                return False
            request_free(self._request)
            self._end(status)
        return True

    def cancel(self, worker: int) -> bool:
        """Ask UCX to drop it. True if it has completed by that: what has begun to arrive, and what is sent, goes on."""
        if not self.completed:
            _request_cancel(worker, self._request)
        return self.completed

    def abandon(self) -> None:
        """Give it back although it goes on: the worker is about to end, and the caller keeps `kept` until it has."""
        if self._request:
            request_free(self._request)
            self._request, self.status = 0, CANCELED

    def _end(self, status: int) -> None:
        self._request, self.status, self.kept = 0, status, None


def drain(worker: int, progress: Callable[[], bool], within_s: float) -> list[Transfer]:
    """Receive all that has arrived and nobody asked for. Gives what had not ended in time: half a message, say, of a
    process that was killed.

    UCXX waits for such a message without a deadline when it destroys a worker (0.52), if it is still there to be found.
    """
    begun: list[Transfer] = []
    info = _Probed()
    deadline = time.monotonic() + within_s
    while True:
        moved = progress()
        while message := _probe(worker, 0, 0, 1, ctypes.addressof(info)):
            size = min(info.length, MAX_MESSAGE_BYTES)
            buffer = np.empty(max(1, size), np.uint8)
            request = _receive_probed(worker, int(buffer.ctypes.data), size, message, HOST)
            begun.append(Transfer(request, buffer, size))
        begun = [transfer for transfer in begun if not transfer.completed]
        if not (moved or begun) or time.monotonic() >= deadline:
            return begun
