"""Messages between ranks: gRPC with mutual TLS, whose bytes are safetensors with a JSON header. Never pickle."""

import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import safetensors.torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from pipelines.errors import TrainingError, one_line
from pipelines.receipt import write_json
from pipelines.train.elastic.certificates import Identity, name_of, who

_SERVICE = "/headrace/"
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_ANY_HOST, _ANY_PORT = "192.0.2.1", 9  # RFC 5737: an address that is nobody's
_CALLERS = 32  # calls that a server answers at once: each worker has one


class Message(NamedTuple):
    """A JSON header and tensors by name."""

    header: dict[str, Any]
    tensors: Mapping[str, Tensor] = {}

    def to_bytes(self) -> bytes:
        """safetensors, with the header among its metadata."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}  # it takes no others
        return safetensors.torch.save(tensors, metadata={"header": json.dumps(self.header)})

    @classmethod
    def of(cls, content: bytes) -> "Message":
        """What was sent.

        Raises:
            ValueError: It is something else.
        """
        length = int.from_bytes(content[:8], "little")  # the format begins with its header's length, and the header
        try:
            metadata = json.loads(content[8 : 8 + length])["__metadata__"]
            return cls(json.loads(metadata["header"]), safetensors.torch.load(content))
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(
                f"wanted safetensors with a header, seen {type(error).__name__}: {one_line(str(error))}"
            ) from None


class Address(BaseModel):
    """Where a rank listens."""

    model_config = ConfigDict(frozen=True)

    host: str
    port: int


Answer = Callable[[int, Message], Message]  # takes the caller's rank


class Server:
    """Answers calls of ranks with a role, and tells in the job's folder where it listens.

    Args:
        folder: The job's.
        rank: This one.
        answers: By method: the roles that may call it, and what answers.
    """

    def __init__(self, folder: Path, rank: int, answers: Mapping[str, tuple[set[str], Answer]]) -> None:
        identity = Identity.read(folder, rank)
        credentials = grpc.ssl_server_credentials(
            [(identity.key.encode(), identity.certificate.encode())],
            identity.authority.encode(),
            require_client_auth=True,
        )
        self._server = grpc.server(ThreadPoolExecutor(_CALLERS), handlers=[_Handler(answers)], options=_OPTIONS)
        host = _own_host()
        port = self._server.add_secure_port(f"{host}:0", credentials)
        self._server.start()
        write_json(address_path(folder, rank), Address(host=host, port=port))

    def close(self) -> None:
        """Answer no more."""
        self._server.stop(grace=1.0).wait()


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, answers: Mapping[str, tuple[set[str], Answer]]) -> None:
        self._answers = answers

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The answer to a method, for those who may ask."""
        found = self._answers.get(details.method.removeprefix(_SERVICE))
        if found is None:
            return None
        roles, answer = found

        def answered(content: bytes, context: grpc.ServicerContext) -> bytes:
            rank, role = who(context.auth_context()["x509_pem_cert"][0])
            if role not in roles:
                wanted = " or ".join(sorted(roles))
                context.abort(
                    grpc.StatusCode.PERMISSION_DENIED, f"wanted the role {wanted}, seen {role} of rank {rank}"
                )
            return answer(rank, Message.of(content)).to_bytes()

        return grpc.unary_unary_rpc_method_handler(answered)


class Peer:
    """Calls a rank, wherever it listens by now.

    Args:
        folder: The job's.
        own: This rank.
        rank: The one that is called.
    """

    def __init__(self, folder: Path, own: int, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._identity = Identity.read(folder, own)
        self._channel: grpc.Channel | None = None

    def call(
        self,
        method: str,
        message: Message,
        *,
        patience_s: float,
        timeout_s: float | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Message:
        """Its answer.

        Args:
            method: What is asked.
            message: With what.
            patience_s: For how long it may not be there.
            timeout_s: For one try; `patience_s` by default.
            is_over: Asked where it is not there: whether it will never be again.

        Raises:
            TrainingError: It was not there, or refused.
        """
        until, content = time.monotonic() + patience_s, message.to_bytes()
        while True:
            try:
                channel = self._connected()
                answer = channel.unary_unary(f"{_SERVICE}{method}")(content, timeout=timeout_s or patience_s)
                return Message.of(answer)
            except (grpc.RpcError, FileNotFoundError) as error:
                code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
                self.close()
                is_gone = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                if not is_gone or time.monotonic() >= until or is_over():
                    raise TrainingError(f"rank {self._rank}: {method}: {_why(error, code)}") from None
            time.sleep(0.1)

    def _connected(self) -> grpc.Channel:
        if self._channel is None:
            address = Address.model_validate_json(address_path(self._folder, self._rank).read_bytes())
            identity = self._identity
            credentials = grpc.ssl_channel_credentials(
                identity.authority.encode(), identity.key.encode(), identity.certificate.encode()
            )
            options = [*_OPTIONS, ("grpc.ssl_target_name_override", name_of(self._rank))]
            self._channel = grpc.secure_channel(f"{address.host}:{address.port}", credentials, options=options)
        return self._channel

    def close(self) -> None:
        """The next call looks anew for where it listens."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None


def address_path(folder: Path, rank: int) -> Path:
    """Where a rank tells its address."""
    return folder / f"address-rank-{rank}.json"


def _why(error: Exception, code: grpc.StatusCode) -> str:
    return str(error.details()) if isinstance(error, grpc.RpcError) and error.details() else code.name.lower()


def _own_host() -> str:
    """The address of this machine on the way to rank 0's, which launchers name in MASTER_ADDR.

    A machine may know its own name by a loopback address, which no other machine reaches.
    """
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, (host, *_) = socket.getaddrinfo(master, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    own = _own_on_the_way_to(str(host), family)
    has_others = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    is_name = not master.startswith(("127.", "::1", "localhost"))
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback and has_others and is_name:
        with contextlib.suppress(OSError):  # it has no way out
            own = _own_on_the_way_to(_ANY_HOST, socket.AF_INET)
    return f"[{own}]" if ":" in own else own


def _own_on_the_way_to(host: str, family: int) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, _ANY_PORT))  # sends nothing
        return str(probe.getsockname()[0])
