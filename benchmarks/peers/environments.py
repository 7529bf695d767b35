"""Virtual environments in which other libraries train, one each, with the torch, transformers and numpy of this one."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".peers"
SHARED = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Peer:
    """A library as pip knows it; with `needs`, what it asks for is not read, and these are installed in its place."""

    requirement: str
    needs: tuple[str, ...] | None = None
    is_slow: bool = False  # it takes minutes a case


PEERS = {
    "blazefl": Peer("blazefl==2.0.1", needs=("tqdm",)),  # it asks for Python 3.12, and runs on 3.11 too
    "pfl": Peer("pfl[pytorch]==0.6.0"),
    "flower": Peer("flwr[simulation]==1.41.0"),
    "nvflare": Peer("nvflare==2.9.0", is_slow=True),
}


# Without the tools of its developers, of which transformers imports some where they are installed.
OURS = Peer(f"--editable={ROOT}")


def make_environment(name: str, peer: Peer) -> str:
    """Return the Python of an environment, which is made first, or again if it is for something else.

    Raises:
        CalledProcessError: pip failed.
    """
    python, marker = FOLDER / name / "bin" / "python", FOLDER / name / "installed"
    pins = [f"{package}=={version(package).partition('+')[0]}" for package in SHARED]
    wanted = f"{sys.version}\n{peer.requirement} {peer.needs}\n{pins}"
    if not marker.exists() or marker.read_text() != wanted:
        print(f"installing {peer.requirement} into {FOLDER / name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER / name], check=True)
        constraints = FOLDER / name / "constraints.txt"
        constraints.write_text("\n".join(pins))
        install = [str(python), "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
        found = [peer.requirement] if peer.needs is None else peer.needs
        subprocess.run([*install, "--constraint", constraints, *SHARED, *found], check=True)
        if peer.needs is not None:
            subprocess.run([*install, "--no-deps", "--ignore-requires-python", peer.requirement], check=True)
        marker.write_text(wanted)
    return str(python)


def version_of(run: str) -> str:
    """Return a program's name, with its version if it is a peer."""
    return f"{run} {PEERS[run].requirement.partition('==')[2]}" if run in PEERS else run
