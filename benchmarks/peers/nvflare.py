"""The cases of overhead.py by NVFlare: its simulator, a process a site, which stays. Started as a script it is a site.

With fewer processes than sites it would start a process for each site of each round. So many sites take much memory.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from nvflare import client
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv
from overhead import CASES, make_batches, make_trainer
from torch import nn


class Weights(nn.Module):
    """All weights of a case's model as one tensor, which is faster than one for each of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name  # from which NVFlare makes it again
        self.weights = nn.Parameter(nn.utils.parameters_to_vector(CASES[name].model().parameters()).detach())


def run(name: str, result: Path) -> None:
    """Train a case by the simulator."""
    case = CASES[name]
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # of the processes of sites
    with tempfile.TemporaryDirectory() as folder:
        moments = Path(folder, "moments")
        local = Path(folder, "job", "local")
        local.mkdir(parents=True)
        (local / "resources.json").write_text(json.dumps({"format_version": 2, "class_allow_list": ["*"]}))
        FedAvgRecipe(
            name="job",
            model=Weights(name),
            min_clients=case.num_sites,
            num_rounds=case.num_rounds,
            train_script=__file__,
            train_args=f"{name} {moments}",
            server_expected_format=ExchangeFormat.PYTORCH,
            key_metric="",
        ).execute(SimEnv(num_clients=case.num_sites, workspace_root=folder, log_config="ERROR"))
        (saved,) = Path(folder).glob("**/FL_global_model.pt")
        end = saved.stat().st_mtime - time.time() + time.monotonic()  # of the last round
        starts = [float(line) for line in moments.read_text().split()]
        assert len(starts) == case.num_rounds
        torch.save(([*starts, end], torch.load(saved)["model"]["weights"]), result)


def train_as_a_site(name: str, moments: str) -> None:
    """Train each model that arrives; the first site notes when."""
    torch.set_num_threads(1)
    case = CASES[name]
    vector, train = make_trainer(case, make_batches(case).__getitem__)
    client.init()
    site = int(client.get_site_name().removeprefix("site-")) - 1
    while client.is_running():
        model = client.receive()
        if site == 0:
            with Path(moments).open("a") as file:
                file.write(f"{time.monotonic()}\n")  # as NVFlare takes what is printed for its log
        vector.copy_(model.params["weights"])
        train(site)
        meta = {"NUM_STEPS_CURRENT_ROUND": case.num_examples}
        client.send(client.FLModel(params={"weights": vector.clone()}, meta=meta))


if __name__ == "__main__":
    train_as_a_site(*sys.argv[1:])
