"""torch's TCPStore, through which processes find each other, bound to the one address that it is for.

torch lets it listen on all addresses of the machine, without any authentication.
"""

import socket
from importlib import import_module
from ipaddress import ip_address
from typing import Any

from torch.distributed import TCPStore


def bound_store(host_name: str, port: int, *, is_master: bool, **options: Any) -> TCPStore:
    """`TCPStore(host_name, port, is_master=is_master, **options)`, listening on the address of `host_name` alone.

    Where that address cannot be determined, or is not this machine's, it listens where torch lets it.
    """
    address = own_address(host_name) if is_master else None
    if address is not None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, port), family=family)
        except OSError:  # behind an address that is translated; or a store of this process has it, and torch shares it
            return TCPStore(host_name, port, is_master=is_master, **options)
        port = listener.getsockname()[1]
        return TCPStore(host_name, port, is_master=True, master_listen_fd=listener.detach(), **options)
    return TCPStore(host_name, port, is_master=is_master, **options)


def own_address(host_name: str) -> str | None:
    """The address by which others reach this machine as `host_name`.

    None where the name resolves to a loopback address here, which is not what others get: many machines have their own
    name in `/etc/hosts`.
    """
    try:
        address = str(socket.getaddrinfo(host_name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None
    named = host_name in ("localhost", address)
    return address if named or not ip_address(address.partition("%")[0]).is_loopback else None


def bind_process_groups() -> None:
    """Use `bound_store` for the process groups of this process from now on."""
    # As an attribute of torch.distributed the name is a function.
    import_module("torch.distributed.rendezvous").TCPStore = bound_store  # type: ignore[attr-defined]


def bind_torchrun() -> None:
    """Use it for torchrun in this process too: for its own store and the one that it makes for the trainers."""
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    def create(self: object, master_addr: str, master_port: int) -> TCPStore:
        return bound_store(master_addr, master_port, is_master=True, multi_tenant=True)

    c10d_rendezvous_backend.TCPStore = bound_store  # type: ignore[misc,assignment]
    dynamic_rendezvous.DynamicRendezvousHandler._create_tcp_store_server = create  # type: ignore[assignment,method-assign]
