"""Instructions, prompts or chats, whose answers a language model learns: a file, or a data set of the hub."""

from scaling_fl.data.tasks.task import Task

TASK = Task(
    defaults={
        **{"model": "smollm2", "train_path": "exercises", "template": "alpaca", "weight_by": "tokens"},
        **{"optimiser": "adamw", "num_local_epochs": 1, "batch_size": 8, "val_batch_size": 8, "max_seq_len": 512},
    },
    is_generative=True,
)
