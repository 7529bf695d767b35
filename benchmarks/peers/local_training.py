"""The training of a site, for the peers that leave it to their user: as fast as the floor's, with data in memory."""

from collections.abc import Callable

import torch
from overhead import LEARNING_RATE, Case
from torch import Tensor, nn

Batches = list[list[tuple[Tensor, Tensor]]]  # of each site: tokens and labels


def make_batches(case: Case) -> Batches:
    """Return the batches of all sites."""
    tokens, labels = map(torch.from_numpy, case.examples())
    return [[(tokens[batch].long(), labels[batch]) for batch in case.batches(site)] for site in range(case.num_sites)]


def make_trainer(case: Case, batches: Batches) -> tuple[Tensor, Callable[[int], None]]:
    """Return the flat vector of a model's weights, and a function that trains it with the batches of a site."""
    model = case.model().train()
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())  # which become views of it
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, fused=True)

    def train(site: int) -> None:
        for ids, labels in batches[site]:
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
            optimiser.zero_grad()
            output.loss.backward()
            optimiser.step()

    return vector, train
