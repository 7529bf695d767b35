"""Sites go on with the states of their optimisers, which are files of their nodes."""

import os
import pickle
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Command, long_but, refusal, succeed, weights_hash
from test_checkpoint import Trap
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from scaling_fl.distributed.launch import launch
from scaling_fl.distributed.world import world
from scaling_fl.experiment.build import build
from scaling_fl.experiment.contradictions import find_contradictions
from scaling_fl.experiment.optimiser_states import check_states, keeps_state
from scaling_fl.experiment.plan import plan
from scaling_fl.experiment.run import train_on_rank
from scaling_fl.experiment.settings import Settings
from scaling_fl.federation.isolation import seed_site
from scaling_fl.federation.site import TRAINERS
from scaling_fl.models.flat import flatten_, trained_weights
from scaling_fl.records import checkpoint
from scaling_fl.records.rounds import Record
from scaling_fl.records.site_states import SiteStates
from scaling_fl.training.optimisers import OPTIMISERS, load_state_
from scaling_fl.training.schedules import linear
from scaling_fl.training.seeds import derive_seed


def run(given: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Train with checkpoints in a folder, and return the weights by name."""
    with world():
        train_on_rank(Settings(**given, checkpoints_dir=str(folder)))
    return checkpoint.read(f"{folder}/round-{given['num_rounds']}.pt")["server"]["weights"]


class Fading(Optimizer):
    """Sums gradients in float64 as the state of a weight, and counts steps in its group of weights."""

    def __init__(self, weights: Any, lr: float) -> None:
        super().__init__(weights, {"lr": lr, "seen": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["seen"] += 1
            for weight in group["params"]:
                path = self.state[weight].setdefault("path", torch.zeros_like(weight, dtype=torch.float64))
                path += weight.grad
                weight -= group["lr"] / group["seen"] * path


MADE = {"adamw": OPTIMISERS["adamw"], "momentum": partial(SGD, momentum=0.9), "fading": Fading}


@pytest.mark.parametrize("optimiser", long_but("fading", MADE))
def test_one_site_has_one_optimiser_that_lives_through_all_rounds_and_a_lost_checkpoint(
    small_run: dict[str, Any], optimiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMISERS, optimiser, MADE[optimiser])
    given = small_run | {"site_ids": [0], "num_rounds": 3, "optimiser": optimiser, "lr_schedule": "linear"}
    with world():
        job = build(Settings(**given))
        model, lives = job.loaded.model.train(), None
        flatten_(model)  # as some CPUs multiply a single row in an order that depends on where the weights are
        for round_ in (1, 2, 3):
            (site,) = job.schedule.train(round_)
            seed_site(1, round_, site, is_alone=True)
            lives = lives or MADE[optimiser](list(trained_weights(model).values()), lr=3e-3)
            order = derive_seed(1, "order", round_, 0, 0)
            for step, batch in enumerate(site.data.shuffled_batches(4, order)):
                lives.param_groups[0]["lr"] = linear(3).rate(3e-3, round_, step, site.num_steps)
                lives.zero_grad()
                model(**batch).loss.backward()
                lives.step()
    kept = given | {"optimiser_state": "keep"}
    weights = run(kept, tmp_path / "kept")
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(model).items())
    assert not torch.equal(run(given, tmp_path / "reset")["classifier.weight"], weights["classifier.weight"])
    (tmp_path / "kept" / "round-3.pt").write_bytes(b"damaged")
    again = run(kept, tmp_path / "kept")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_a_state_is_loaded_whole_but_for_its_rates() -> None:
    old, new = (MADE["momentum"]([torch.ones(2)], lr=rate) for rate in (0.5, 0.25))
    old.param_groups[0]["params"][0].grad = torch.ones(2)
    old.step()
    old.param_groups[0]["own"] = 7
    load_state_(new, old.state_dict())
    groups = [of.state_dict()["param_groups"][0] for of in (old, new)]
    assert groups[1] == groups[0] | {"lr": 0.25}
    assert groups[1]["own"] == 7
    assert torch.equal(*(of.state[of.param_groups[0]["params"][0]]["momentum_buffer"] for of in (old, new)))


class Dying(AdamW):
    """AdamW in a process that is killed before a step."""

    left = -1  # steps

    def step(self, closure: Any = None) -> Any:
        Dying.left -= len(self.param_groups[0]["params"]) > 1  # else it is measured
        if Dying.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


def test_ranks_cohorts_and_a_kill_in_a_round_change_no_bit(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMISERS, "dying", Dying)
    given = {"optimiser": "dying", "optimiser_state": "keep", "sites_per_round": 3, "lr_schedule": "cosine"}
    given |= {"num_rounds": 4, "max_grad_norm": 1.0}
    given |= {"seed": 7}  # with which site 1 is on the other rank in each round if ranks share all sites
    alone = succeed(command(ranks=2, num_sites=4, site_ids=[0], **given))
    (temporary,) = re.findall(r"^states .* in (\S*scaling_fl-optimisers-\w+)$", alone, re.MULTILINE)
    assert not Path(temporary).exists(), "as it goes with the run"
    fixed = given | {"site_ids": [0, 0, 0, 0], "checkpoints_dir": tmp_path / "saved"}
    monkeypatch.setattr(Dying, "left", 2 * 12 + 2 * 4 + 2)  # in the third site of round 3
    status, _ = command(**fixed)
    assert status == -signal.SIGKILL
    files = sorted(path.name for path in (tmp_path / "saved" / "optimisers").glob("site-*-round-3.pt"))
    assert len(files) == 2
    monkeypatch.setattr(Dying, "left", -1)
    resumed = succeed(command(ranks=2, **fixed))
    assert weights_hash(resumed) == weights_hash(alone)


def make_states(folder: Path, history: checkpoint.History, run: str = "ours", **options: Any) -> SiteStates:
    folder.mkdir(mode=0o700, exist_ok=True)
    return SiteStates(str(folder), history, run, **{"is_temporary": False} | options)


@pytest.mark.parametrize("is_temporary", [False, True])
def test_a_site_goes_on_where_it_last_took_part_and_the_disk_has_no_more_than_was_planned(
    tmp_path: Path, is_temporary: bool
) -> None:
    random, history, expected, most = Random(3), [{}], dict[int, Any](), 0
    states = make_states(tmp_path, history, is_temporary=is_temporary)
    need = states.measure(1, 6, 4, 30)
    for round_ in range(1, 31):
        cohort, before = random.sample(range(6), 4), dict(expected)
        for site in cohort:
            assert states.load(site) == expected.get(site)
            states.save(site, round_, {"of": [site, "text", None, round_]})
        most = max(most, states.num_files)
        failed = random.sample(cohort, random.randrange(3))
        history.append({"site.examples": {site: 5 for site in cohort if site not in failed}})
        expected |= {site: {"of": [site, "text", None, round_]} for site in history[-1]["site.examples"]}
        states.remove_old(range(6))
        resumed = make_states(tmp_path, history[: round_ + is_temporary])  # from the checkpoint before the last
        for site in range(6):
            assert resumed.load(site) == (expected if is_temporary else before).get(site)
    assert most == need.peak == (10 if is_temporary else 14)
    assert states.num_files <= need.final
    assert states.measure(1, 6, 4, 1).peak + states.num_files <= need.peak
    of_another_rank = [*tmp_path.glob("site-0-*")]
    history += [{"site.examples": {0: 1, 1: 1}}] * 2
    states.remove_old([1])
    assert [*tmp_path.glob("site-0-*")] == of_another_rank != [*tmp_path.glob("site-1-*")] == []
    states.close()
    assert tmp_path.exists() != is_temporary


def test_a_state_is_a_private_file_whose_absence_damage_and_origin_are_noticed(tmp_path: Path) -> None:
    folder, history = tmp_path / "optimisers", [{}, {"site.examples": {3: 7}}]
    states, path = make_states(folder, history), folder / "site-3-round-1.pt"
    states.save(3, 1, {"momentum": torch.arange(5.0)})
    assert [stat.S_IMODE(of.stat().st_mode) for of in (folder, path)] == [0o700, 0o600]
    assert [of.name for of in folder.iterdir()] == [path.name]
    expected = f"{path}: expected the state of the optimiser of site 3 after round 1, got "
    assert refusal(lambda: make_states(folder, history, "theirs").load(3)) == (
        f"{expected}that of another run, site or round"
    )
    data = path.read_bytes()
    where = data.index(torch.arange(5.0).numpy().tobytes())
    for damaged in (data[:-9], b"", data[:where] + b"\1" + data[where + 1 :], pickle.dumps(Trap())):
        path.write_bytes(damaged)
        assert refusal(lambda: states.check([2, 3])).startswith(f"{expected}a damaged file (")
    path.unlink()
    assert refusal(lambda: states.load(3)) == (
        f"{expected}no file. It is on the node where the site trained: copy it from there, from the folder "
        "'optimisers' of checkpoints_dir, or remove the last checkpoint to go on from the round before"
    )
    assert refusal(lambda: states.save(3, 2, {"group": {"of": object()}})).startswith(
        "optimiser_state: expected 'reset', as the state of the optimiser cannot be written (Object of type object"
    )


def test_a_disk_that_takes_no_more_is_named_and_keeps_what_it_has(tmp_path: Path) -> None:
    states = make_states(tmp_path, [{}, {"site.examples": {0: 1}}])
    states.save(0, 1, {"momentum": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        states.save(0, 2, {"momentum": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with world():
        says = refusal(states.check_saved)
    path = tmp_path / "site-0-round-2.pt"
    assert says == f"{path}: expected a disk that can be written to, got [Errno 27] File too large"
    assert [of.name for of in tmp_path.iterdir()] == ["site-0-round-1.pt"]
    assert states.load(0) is not None


def test_a_state_that_is_missing_on_a_rank_is_an_error_before_training(
    small_run: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = small_run | {"site_ids": [0, 0], "num_rounds": 1, "optimiser_state": "keep"}
    run(given, tmp_path)
    (tmp_path / "optimisers" / "site-1-round-1.pt").unlink()

    def resume() -> None:
        with world():
            build(Settings(**given | {"num_rounds": 2}, checkpoints_dir=str(tmp_path)))

    with pytest.raises(SystemExit):
        launch(resume, num_ranks=2, fork=True)
    problem = "site-1-round-1.pt: expected the state of the optimiser of site 1 after round 1, got no file"
    assert problem in capfd.readouterr().err


def test_sites_of_any_node_are_refused_on_several_nodes(small_run: dict[str, Any]) -> None:
    def sentence() -> str:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        with world():
            return refusal(lambda: build(Settings(**small_run, site_ids=[0], num_sites=4, optimiser_state="keep")))

    assert {*launch(sentence, num_ranks=2, fork=True)} == {
        "optimiser_state: expected 'reset', as the sites of num_sites or site_column train on any node, got 'keep'. "
        "Give each site an entry in the site_ids of its node"
    }


def test_what_states_take_is_planned_and_refused_before_the_disk_is_full(
    small_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = small_run | {"site_ids": [0] * 3, "optimiser_state": "keep", "best_metric": None, "num_rounds": 1}
    run(given, tmp_path)
    size = (tmp_path / "optimisers" / "site-0-round-1.pt").stat().st_size

    def planned(num_rounds: int, free: int) -> dict[str, Any]:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=1, free=free))
        with world():
            return plan(Settings(**given | {"num_rounds": num_rounds}, checkpoints_dir=str(tmp_path)))

    found = planned(2, 1_000_000)
    assert size <= found["state_bytes"] <= 1.2 * size
    assert found["node_state_bytes"] == 6 * found["state_bytes"]
    assert "states    0.2 MB for a site's optimiser, at most 1.3 MB on this node, in " in capsys.readouterr().out
    assert planned(9, 10_000_000)["node_state_bytes"] == 9 * found["state_bytes"]
    assert "for another checkpoint and 3 states of optimisers, got 0.6 MB" in refusal(lambda: planned(2, 600_000))


def act_in_step(number: int, act: Callable[[], object]) -> type[Optimizer]:
    """Return AdamW that does something else in one of its steps of a model, counted over all rounds."""

    class Acting(AdamW):
        def step(self, closure: Any = None) -> Any:
            if len(self.param_groups[0]["params"]) > 1:
                steps.append(0)
                if len(steps) == number:
                    act()
            return super().step(closure)

    steps: list[int] = []
    return Acting


def test_states_stay_if_the_weights_had_to_be_saved_elsewhere(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def block() -> None:
        (tmp_path / "rounds.jsonl").unlink()
        (tmp_path / "rounds.jsonl").mkdir()

    monkeypatch.setitem(OPTIMISERS, "blocking", act_in_step(7, block))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = small_run | {"site_ids": [0], "num_rounds": 3, "local_steps": 4, "optimiser": "blocking"}
    given |= {"optimiser_state": "keep"}

    with world(), pytest.raises(ValueError, match="expected a disk") as caught:
        train_on_rank(Settings(**given), Record(str(tmp_path)))
    found = re.search(
        r"The weights of round 2 are in (.*)/round-2.pt. Run the same .* to resume. The states of the optimisers are "
        r"in (.*): first copy that folder there, as 'optimisers'$",
        str(caught.value),
    )
    assert found, caught.value
    shutil.copytree(found[2], f"{found[1]}/optimisers")
    resumed = run(given, Path(found[1]))
    assert all(torch.equal(resumed[name], weight) for name, weight in run(given, tmp_path / "whole").items())


@pytest.mark.parametrize("on_site_failure", ["abort", "skip"])
def test_a_state_that_cannot_be_written_is_no_failure_of_a_site_and_loses_no_round(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_site_failure: str
) -> None:
    def block() -> None:
        (folder,) = tmp_path.glob("scaling_fl-optimisers-*")
        (folder / ".site-0.pt.part").mkdir()

    monkeypatch.setitem(OPTIMISERS, "blocking", act_in_step(4, block))  # the last one of round 2
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = small_run | {"site_ids": [0], "num_rounds": 3, "local_steps": 2, "optimiser": "blocking"}
    given |= {"optimiser_state": "keep", "on_site_failure": on_site_failure}
    record = tmp_path / "record"
    record.mkdir()
    with world(), pytest.raises(ValueError, match=r"site-0-round-2\.pt: expected a disk .* weights of round 1 are in"):
        train_on_rank(Settings(**given), Record(str(record)))
    (left,) = tmp_path.glob("scaling_fl-optimisers-*")
    assert left.name.endswith("-left"), "the folder of the run is gone, and the states are not"
    assert (left / "site-0-round-1.pt").exists()
    shutil.copytree(left, record / "checkpoints" / "optimisers")
    resumed = run(given, record / "checkpoints")
    assert all(torch.equal(resumed[name], weight) for name, weight in run(given, tmp_path / "whole").items())


class Odd(SGD):
    """An optimiser with something in its group of weights that no checkpoint has."""

    def __init__(self, weights: Any, lr: float, what: object) -> None:
        super().__init__(weights, lr, momentum=0.9)
        self.param_groups[0]["what"] = what


class Counting(SGD):
    """An optimiser whose state is in its group of weights alone."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["seen"] = self.param_groups[0].get("seen", 0) + 1
        return super().step(closure)


def test_states_that_cannot_be_kept_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS, "mine", lambda model, site, round_: {})

    def refused(**given: Any) -> list[str]:
        return find_contradictions(Settings(**{"optimiser": "adamw", "optimiser_state": "keep"} | given))

    expected = "optimiser_state: expected 'reset', as {}, got 'keep'"
    assert not refused() + refused(checkpoints_dir="runs/c") + refused(checkpoints_dir="file:///runs/c")
    assert refused(trainer="mine") == [expected.format("trainer='mine' does not know it")]
    sgd = Settings(optimiser="sgd", optimiser_state="keep")
    assert refusal(lambda: check_states(sgd)) == expected.format("optimiser='sgd' has no state")
    assert refused(adapter="lora", lora_mean="alternate") == [
        expected.format("lora_mean='alternate' trains other weights in each round")
    ]
    assert refused(checkpoints_dir="s3://bucket/c") == [
        expected.format("the states of sites stay on their nodes, and checkpoints_dir='s3://bucket/c' is elsewhere")
    ]
    for what in (np.float64(1.0), torch.float64, object()):
        monkeypatch.setitem(OPTIMISERS, "odd", lambda weights, lr, what=what: Odd(weights, lr, what))
        odd = refusal(lambda: check_states(Settings(optimiser="odd", optimiser_state="keep")))
        assert odd.startswith("optimiser_state: expected 'reset', as the state of the optimiser cannot be written and ")
    monkeypatch.setitem(OPTIMISERS, "counting", Counting)
    check_states(Settings(optimiser="counting", optimiser_state="keep"))


def test_what_is_checked_before_ranks_are_forked_starts_no_threads_and_asks_no_gpu() -> None:
    """A fork of a process in which torch has computed with several threads waits for them forever.

    And CUDA, which the import of bitsandbytes starts, works in no fork.
    """

    def count_new_threads(check: Callable[[Settings], Any]) -> int:
        torch.set_num_threads(2)
        for name in [name for name in sys.modules if name.startswith("bitsandbytes")]:  # of earlier tests
            del sys.modules[name]
        before = len(os.listdir("/proc/self/task"))
        turns = {"adapter": "lora", "lora_mean": "alternate", "strategy": "fedadam"}
        quantised = {"adapter": "lora", "quantise": 4, "base_dtype": "bfloat16", "merge": True}
        eight = {"optimiser": "adamw8bit", "optimiser_state": "keep"}
        for settings in ({"optimiser_state": "keep"}, {"centralised": True}, turns, quantised, eight):
            check(Settings(**{"optimiser": "adamw"} | settings))
        return len(os.listdir("/proc/self/task")) - before + 100 * ("bitsandbytes" in sys.modules)

    (after_checks,) = launch(count_new_threads, find_contradictions, num_ranks=1, fork=True)
    (after_step,) = launch(count_new_threads, keeps_state, num_ranks=1, fork=True)
    assert after_checks == 0 < after_step
