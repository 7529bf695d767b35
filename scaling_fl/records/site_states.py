"""The states of sites' optimisers from round to round: a file each, on the disk of the node where the site trains."""

import io
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable
from typing import Any

import torch

from scaling_fl.distributed.collectives import all_gather
from scaling_fl.errors import one_line
from scaling_fl.records import checkpoint
from scaling_fl.records.checksum import sign
from scaling_fl.records.export import SpaceNeeded, complete
from scaling_fl.storage import WriteError, local_path

log = logging.getLogger(__name__)

NAME = re.compile(r"site-(\d+)-round-(\d+)\.pt")
FOLDER = "optimisers"  # in the folder of checkpoints


class SiteStates:
    """The states of the optimisers of a node's sites, which its ranks share, in files for their owner alone.

    A site goes on with the state of the last round in which it took part by the history of the run: a site that failed
    is where it was before.

    Args:
        folder: of the node, which exists until the end of the run.
        history: of the rounds that are done. The run adds each of the next.
        run: what a file of this run has, and no other.
        is_temporary: the folder goes with the run, which leaves no checkpoint. Otherwise the states of the round before
            the last are kept, too, as a run goes on there if the last checkpoint is missing or damaged.
    """

    def __init__(self, folder: str, history: checkpoint.History, run: str, *, is_temporary: bool) -> None:
        self.folder, self.is_temporary = folder, is_temporary
        self.num_kept = 1 if is_temporary else 2  # rounds
        self._history, self._run = history, run
        self._problem = ""  # why a state of this round is not on the disk

    def load(self, site: int) -> dict[str, Any] | None:
        """Return the state with which a site goes on; None: it did not take part yet.

        Raises:
            ValueError: its file is missing, damaged, or of another run.
        """
        round_ = self._find_last(site)
        if round_ == 0:
            return None
        path = self._path(site, round_)
        wanted = f"{path}: expected the state of the optimiser of site {site} after round {round_}, got"
        if not os.path.exists(path):
            raise ValueError(
                f"{wanted} no file. It is on the node where the site trained: copy it from there, from the folder "
                f"{FOLDER!r} of checkpoints_dir, or remove the last checkpoint to go on from the round before"
            )
        try:
            found = checkpoint.load(path)
        except ValueError as error:
            raise ValueError(
                f"{wanted} a damaged file ({error}). Remove the last checkpoint to go on from the round before"
            ) from error
        if (found.get("run"), found.get("site"), found.get("round")) != (self._run, site, round_):
            raise ValueError(f"{wanted} that of another run, site or round")
        return found["state"]

    def save(self, site: int, round_: int, state: dict[str, Any]) -> None:
        """Write the state of a site after a round, completely or not at all. `check_saved` tells whether it is there.

        Raises:
            ValueError: it has something else than tensors, numbers, texts, lists and dicts.
        """
        try:
            signed = sign({"run": self._run, "site": site, "round": round_, "state": state})
        except TypeError as error:
            raise ValueError(
                f"optimiser_state: expected 'reset', as the state of the optimiser cannot be written ({error}), got "
                "'keep'"
            ) from error
        path, part = self._path(site, round_), os.path.join(self.folder, f".site-{site}.pt.part")
        try:
            with (
                complete(path, part),
                open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file,
            ):
                torch.save(signed, file)
        except WriteError as error:  # which is no failure of the site
            self._problem = str(error)

    def check_saved(self) -> None:
        """Check that all states of this round are on the disks of all nodes. All ranks call it.

        Raises:
            WriteError: a disk cannot be written to.
        """
        if problems := [problem for problem in all_gather(self._problem) if problem]:
            raise WriteError(problems[0])

    def check(self, sites: Iterable[int]) -> None:
        """Check that the states with which sites go on are whole.

        Raises:
            ValueError: one is not.
        """
        for site in sites:
            self.load(site)

    def remove_old(self, sites: Collection[int]) -> None:
        """Remove the states of these sites that no checkpoint needs from which the run may resume."""
        for site, rounds in self._list_files().items():
            needed = {self._find_last(site, age) for age in range(self.num_kept)} if site in sites else rounds
            for path in (self._path(site, round_) for round_ in rounds - needed):
                try:
                    os.remove(path)
                except OSError as error:
                    log.warning("%s cannot be removed: %s", path, one_line(error))

    @property
    def num_files(self) -> int:
        """How many states are on the disk."""
        return sum(map(len, self._list_files().values()))

    def leave(self) -> str:
        """Let the files stay, and return a sentence on how a run goes on with them."""
        if self.is_temporary:
            left = f"{self.folder}-left"
            os.rename(self.folder, left)  # under the old name other ranks remove it
            self.folder, self.is_temporary = left, False
        return f"The states of the optimisers are in {self.folder}: first copy that folder there, as {FOLDER!r}"

    def close(self) -> None:
        """Remove a temporary folder."""
        if self.is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def measure(self, size: int, num_sites: int, num_trained: int, num_rounds: int) -> SpaceNeeded:
        """Return the additional space that the states need.

        Args:
            size: of a state in bytes.
            num_sites: of this node.
            num_trained: the most of them in a round.
            num_rounds: that remain.
        """
        kept = num_sites + (self.num_kept - 1) * num_trained
        num_new = num_trained * num_rounds
        peak, final = (max(min(most - self.num_files, num_new), 0) for most in (kept + num_trained, kept))
        return SpaceNeeded(self.folder, self.folder, f"{peak:,} states of optimisers", peak * size, final * size)

    def _list_files(self) -> dict[int, set[int]]:
        """Return the rounds of the files of each site."""
        found: dict[int, set[int]] = {}
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            if match := NAME.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(int(match[2]))
        return found

    def _find_last(self, site: int, age: int = 0) -> int:
        """Return the last round in which a site took part, but for the last `age` rounds; 0 if there is none."""
        rounds = range(len(self._history) - 1 - age, 0, -1)
        return next((round_ for round_ in rounds if site in self._history[round_]["site.examples"]), 0)

    def _path(self, site: int, round_: int) -> str:
        return os.path.join(self.folder, f"site-{site}-round-{round_}.pt")


def try_to_keep(state: dict[str, Any]) -> None:
    """Write a state into memory, and read it as a file would be read.

    Raises:
        ValueError: that cannot be done.
    """
    file = io.BytesIO()
    try:
        torch.save(sign({"state": state}), file)
        checkpoint.load(file.getvalue())
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of the optimiser cannot be written and read again ({one_line(error)})") from error


def local_folder(directory: str) -> str | None:
    """Return the folder of states for a folder of checkpoints; None if that is not on a local disk."""
    path = local_path(directory)
    return None if path is None else os.path.join(path, FOLDER)
