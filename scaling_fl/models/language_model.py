"""Load a causal language model: each token sees those before it only."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scaling_fl.errors import one_line
from scaling_fl.models.generate import find_end_ids
from scaling_fl.models.loading import load
from scaling_fl.models.pretrained import LoadedModel, Pretrained, make_unloaded


def make_language_model(
    pretrained: Pretrained, seed: int, end_id: int | None, dtype: torch.dtype | str = torch.float32
) -> LoadedModel:
    """Load a causal language model. Its cache is off, which packed texts would share.

    Args:
        pretrained: the model.
        seed: of the weights of a model without pretrained ones.
        end_id: a token that ends a generated answer, too.
        dtype: of its weights; `auto` is that of its files.

    Raises:
        ValueError: the model cannot be found, its files lack weights, or it is no causal language model.
    """
    pretrained.config.return_dict = True
    torch.manual_seed(seed)
    if not pretrained.has_weights:
        loaded = make_unloaded(pretrained, pretrained.config, AutoModelForCausalLM, dtype)
    else:
        model, info = load(
            pretrained.base,
            AutoModelForCausalLM.from_pretrained,
            config=pretrained.config,
            dtype=dtype,
            output_loading_info=True,
        )
        loaded = LoadedModel(model, [])
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"model={pretrained.name!r}: expected all weights of a causal language model in its files, got none "
                f"for {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
            )
    model = loaded.model
    if not pretrained.is_empty:
        check_causal(model, pretrained.name)
    model.config.use_cache = False
    if end_id is not None:
        model.generation_config.eos_token_id = find_end_ids(model, end_id)
    return loaded


@torch.inference_mode()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Check that no token of a model sees later ones, as it would in training for the next one.

    Raises:
        ValueError: one does.
    """
    was_training = model.training
    model.eval()
    texts = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]], device=model.device) % model.config.get_text_config().vocab_size
    try:
        logits = model(input_ids=texts, attention_mask=torch.ones_like(texts)).logits
    except Exception as error:
        raise ValueError(
            f"model={name!r}: expected a causal language model, got an error: {one_line(error)}"
        ) from error
    model.train(was_training)
    if not torch.allclose(logits[0, :3], logits[1, :3], rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"model={name!r}: expected a causal language model, in which each token sees those before it only, got "
            f"{type(model).__name__}, in which it sees all. Use model=smollm2, or another decoder"
        )
