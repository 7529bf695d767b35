"""AG News and Yelp reviews, as the CSV files of Crepe (Zhang et al. 2015, arXiv 1509.01626)."""

from scaling_fl.data.tasks.task import Task, from_table


def _unescape(rows: dict[str, list]) -> dict[str, list]:
    """Undo how Crepe writes a new line: as a backslash and an n."""
    return {"text": [text.replace("\\n", "\n") for text in rows["text"]]}


# Without `clean`: in this file a backslash stands for a new line, even before an n.
AGNEWS = Task(
    from_table("Class Index", "Title", "Description"),
    columns=("Description", "Class Index"),
    labels={"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"},
)
YELP = Task(
    from_table("stars", "text"),
    columns=("text", "stars"),
    labels={stars: stars for stars in ("1", "2", "3", "4", "5")},
    clean=_unescape,
)
