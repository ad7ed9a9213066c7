"""Stores of process groups listen on one address."""

import os
import socket
from importlib import import_module

import psutil
import pytest
from torch.distributed import TCPStore

from rollout import tcp_store as module
from rollout.tcp_store import bind_process_groups, bound_store, own_address


def listening() -> list[tuple[str, int]]:
    connections = psutil.Process(os.getpid()).net_connections("inet")
    return [tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_store_of_this_machine_listens_on_loopback_alone_and_is_shared_in_its_process(host: str) -> None:
    before = set(listening())
    store = bound_store(host, 0, is_master=True, multi_tenant=True)
    (found,) = set(listening()) - before
    assert found == ("127.0.0.1", store.port)
    again = bound_store(host, store.port, is_master=True, multi_tenant=True)
    client = bound_store(host, store.port, is_master=False)
    again.set("a", "1")
    assert client.get("a") == store.get("a") == b"1"
    assert set(listening()) - before == {found}


def test_process_groups_meet_on_the_address_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous = import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(rendezvous, "TCPStore", TCPStore)  # so that it comes back
    bind_process_groups()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29641")
    before = set(listening())
    store, _, _ = next(rendezvous.rendezvous("env://", rank=0, world_size=1))
    assert set(listening()) - before == {("127.0.0.1", 29641)}
    store.set("a", "1")


def test_torch_itself_listens_everywhere() -> None:
    """If this fails, torch has learned it and `bound_store` can go."""
    before = set(listening())
    store = TCPStore("127.0.0.1", 0, is_master=True)
    assert set(listening()) - before == {("::", store.port)}


def test_a_name_that_may_mean_another_address_elsewhere_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(address: str) -> None:
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
        monkeypatch.setattr(module.socket, "getaddrinfo", lambda *arguments, **options: answer)

    resolve("127.0.1.1")
    assert own_address("node0") is None
    resolve("192.0.2.77")
    assert own_address("node0") == "192.0.2.77"


def test_an_address_that_is_not_this_machines_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "own_address", lambda host: "192.0.2.77")  # of a router before it
    store = bound_store("127.0.0.1", 0, is_master=True)
    store.set("a", "1")
    assert store.get("a") == b"1"
