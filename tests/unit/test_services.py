"""What is said of the embedded servers before they start: their ports."""

from __future__ import annotations

import socket
import threading

from infra import services
from infra.services import HOST, OWN_PORTS, PORTS, choose_ports
from infra.settings import SERVICES


def test_each_port_is_drawn_from_our_own_and_no_other_services() -> None:
    for _ in range(200):
        ports: dict[str, int] = {}
        for service in SERVICES:
            ports |= choose_ports(service, ports)
        assert len(set(ports.values())) == len(ports) == sum(map(len, PORTS.values()))
        assert all(port in range(*OWN_PORTS) for port in ports.values())


def test_last_times_ports_are_taken_again() -> None:
    last = {name: port for service in SERVICES for name, port in choose_ports(service, {}).items()}
    assert [choose_ports(service, last) for service in SERVICES] == [{name: last[name] for name in PORTS[service]} for service in SERVICES]


def test_a_port_that_two_services_have_is_given_up_by_one() -> None:
    last = choose_ports("s3", {})
    last |= {"mlflow": last["s3"]}
    assert choose_ports("mlflow", last)["mlflow"] != last["s3"]
    assert last["s3"] == last["mlflow"]


def test_a_port_that_another_program_has_is_given_up() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = int(other.getsockname()[1])
        assert choose_ports("s3", {"s3": port})["s3"] != port


def test_what_is_no_http_on_a_port_is_no_answer() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = int(other.getsockname()[1])

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x01\x02 no http\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert services._get(f"http://{HOST}:{port}/health") == b""
        thread.join()
