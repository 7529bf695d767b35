"""Who wrote it: Poe (EAP), Lovecraft (HPL) or Mary Shelley (MWS), from Kaggle's competition."""

from scaling_fl.data.tasks.task import Task, from_table

TASK = Task(
    from_table("id", "text", "author"),
    columns=("text", "author"),
    labels={author: author for author in ("EAP", "HPL", "MWS")},
)
