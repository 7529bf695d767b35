"""How the ranks of one machine find each other."""

import socket

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "one machine"
LOOPBACK = "127.0.0.1"


class OneMachine(RendezvousHandler):
    """A store for the ranks, which this process serves. As there is no other node, nothing waits or is agreed on.

    That of torch, for nodes that come and go, takes longer than a short round of training, and listens on all
    interfaces.
    """

    use_agent_store = True  # the ranks join this store, too

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Serve the store on the loopback interface, at a port that the system chooses."""
        server = socket.create_server((LOOPBACK, 0))
        port = server.getsockname()[1]
        store = TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def get_backend(self) -> str:
        """Return the name under which torch knows it."""
        return BACKEND

    def get_run_id(self) -> str:
        """Return the name of the run."""
        return self._run_id

    def num_nodes_waiting(self) -> int:
        """Return that no node waits."""
        return 0

    def is_closed(self) -> bool:
        """Tell that it is open."""
        return False

    def set_closed(self) -> None:
        """Do nothing, as no node would learn of it."""

    def shutdown(self) -> bool:
        """Do nothing: the store ends with the last reference to it."""
        return True


rendezvous_handler_registry.register(BACKEND, OneMachine)
