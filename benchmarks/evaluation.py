"""Show what evaluation costs, at sites or in larger batches, and what it costs to keep the best model.

Federations of a model of DistilBERT's size train one batch at one site in each round, and evaluate the same number of
examples. They run in turn, in processes of their own. Printed are the median seconds of an evaluation, also as a
multiple of that on the common test set, and the median seconds of writing `best.pt`, where each round is the best.

    python benchmarks/evaluation.py --repeats 3
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from commands import Command, put_data, put_model

NUM_SITES, NUM_EXAMPLES = 50, 100  # of the evaluation
OWN = {"central_evaluation": False, "max_test_examples_per_site": NUM_EXAMPLES // NUM_SITES}
VARIANTS = {
    "common test set": {},
    "the same in batches of 512": {"val_batch_size": 512},
    f"at {NUM_SITES} sites": OWN,
    "the same with evaluate_local": {**OWN, "evaluate_local": True},
}


def main() -> None:
    """Measure all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="with a tiny model, to see that it works")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            **{
                "task_name": "text",
                "model": put_model(folder, small=options.small),
                "site_ids": [0],
                "num_sites": NUM_SITES,
            },
            **{"train_path": str(put_data(folder / "train.csv", 8 * NUM_SITES)), "num_rounds": 1, "report": False},
            **{"test_path": str(put_data(folder / "test.csv", NUM_EXAMPLES)), "sites_per_round": 1},
            **{"local_steps": 1, "batch_size": 4, "max_seq_len": 128, "optimiser": "sgd", "learning_rate": 0.01},
        }
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for repeat in range(options.repeats):
            for number, (variant, changes) in enumerate(VARIANTS.items()):
                found[variant] += Command(folder, f"{number}-{repeat}", "with", settings | changes).rounds()
    first = statistics.median(of["time.evaluate_s"] for of in found["common test set"])
    for variant, rounds in found.items():
        seconds = statistics.median(of["time.evaluate_s"] for of in rounds)
        print(f"{variant:<30} {seconds:>8.2f} s ({seconds / first:.2f})")
    written = [of["time.checkpoint_s"] for rounds in found.values() for of in rounds if of["time.checkpoint_s"] > 0.01]
    print(f"{'best.pt':<30} {statistics.median(written):>8.2f} s")


if __name__ == "__main__":
    main()
