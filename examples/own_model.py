"""Ten sites train a small CNN on handwritten digits: any model, any loss, any batches."""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from scaling_fl import Federation, Site, dirichlet, launch, partition_indices, place_sites, world

PIXELS, LABELS = load_digits(return_X_y=True)
DIGITS = TensorDataset(torch.tensor(PIXELS.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32), torch.tensor(LABELS))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 10))


def train_site(model, site, round_):  # seeds what it draws, keeps no state, trains the weights in place
    optimiser = torch.optim.SGD(model.parameters(), lr=site.settings.get("learning_rate", 0.05), momentum=0.9)
    order = torch.Generator().manual_seed(1000 * round_ + site.number)
    for images, labels in DataLoader(site.data, batch_size=16, shuffle=True, generator=order):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images.to(site.device)), labels.to(site.device)).backward()
        optimiser.step()
    return {"num_examples": len(site.data)}


def evaluate_site(model, site, round_):
    images, labels = DIGITS[1500 + site.number :: 10]  # a tenth of those that no site trains on
    is_right = model(images.to(site.device)).argmax(1).cpu() == labels
    return {"num_examples": len(labels), "accuracy": (is_right.sum(), len(labels))}


def make_federation():
    parts = partition_indices(LABELS[:1500], 10, partial(dirichlet, dirichlet_alpha=0.5), seed=0)
    topology = place_sites([0] * 10)
    sites = [Site(i, device, len(parts[i]), Subset(DIGITS, parts[i])) for i, device in topology.sites.items()]
    return Federation(topology, sites, make_model(), train_site=train_site, evaluate_site=evaluate_site)


def main(num_rounds=5):
    with world():
        federation, accuracies = make_federation(), []
        for round_ in range(1, num_rounds + 1):
            federation.train(round_)
            federation.global_model.step()
            accuracies.append(round(federation.evaluate(round_)["validation.accuracy"], 3))
        return accuracies, federation.global_model.sha256()


if __name__ == "__main__":
    for num_ranks in (1, 2):
        print(num_ranks, "ranks:", *launch(main, num_ranks=num_ranks)[0])
