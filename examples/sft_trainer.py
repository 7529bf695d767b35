"""A trainer by name: each site trains the run's LoRA with `trl.SFTTrainer`.

    EXTRAS=llm ./run-local.sh scripts/train_federated.py with "plugins=['examples.sft_trainer']" trainer=sft \
        task_name=instruct model=... adapter=lora optimiser=adamw

or, from Python, `train(Settings(plugins=["examples.sft_trainer"], trainer="sft", ...))`. To use a script of your own,
copy this file, and put your `SFTConfig` into it. The run has what else is in such a script: the model and its adapter
(`adapter=lora`, or `adapter_config`, in place of `peft_config`), the template, and what is saved. A site has a new
trainer in each round, so that its steps, its optimiser and its schedule start again. The rate is therefore constant
here; for a schedule over all rounds use the built-in training and its `lr_schedule`. What is not set below is trl's,
such as gradients of norm 1 at most, and no weight decay.
"""

from tempfile import TemporaryDirectory

from datasets import Dataset
from transformers import PrinterCallback

from scaling_fl import TRAINERS
from scaling_fl.training.seeds import derive_seed

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError('expected trl and peft. Install them: pip install "trl>=1.16" "peft>=0.17"') from error


def train_site(model, site, round_):
    own = site.settings
    if own["proximal_mu"]:
        raise ValueError(f"proximal_mu: expected 0, as trainer='sft' does not know it, got {own['proximal_mu']}")
    seed = derive_seed(own["seed"], "trl", round_, site.number) % 2**32  # of the order of the rows, and of dropout
    texts = site.data.shuffled_batches(1, own["seed"])
    rows = Dataset.from_list([{name: text[name][0].tolist() for name in ("input_ids", "labels")} for text in texts])
    with TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            seed=seed,
            num_train_epochs=own["num_local_epochs"],
            per_device_train_batch_size=own["batch_size"],
            learning_rate=own["learning_rate"],
            lr_scheduler_type="constant",
            optim={"adamw": "adamw_torch", "adamw8bit": "adamw_8bit", "sgd": "sgd"}[own["optimiser"]],
            bf16=False,
            activation_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokens
            use_cpu=site.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        trained = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
        trainer = SFTTrainer(model, arguments, train_dataset=rows)
        for weight, data in trained:
            weight.data = data  # which trl rounds to bfloat16 beside a base in 8 or 4 bits
        trainer.remove_callback(PrinterCallback)
        num_steps, mean_loss, _ = trainer.train()
    return {"num_examples": len(rows), "loss": (mean_loss * num_steps, num_steps)}


TRAINERS["sft"] = train_site
