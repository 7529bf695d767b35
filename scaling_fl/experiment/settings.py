"""The settings of a run: one dataclass, from which the command line, the checks and the table of docs/settings.md are made."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from scaling_fl.data.nicknames import data_defaults
from scaling_fl.data.partition import PARTITIONERS
from scaling_fl.data.tasks import TASKS, is_generative, task_defaults
from scaling_fl.data.templates import TEMPLATES
from scaling_fl.experiment.kinds import (
    BITS,
    COUNT_OR_FRACTION,
    DEVICE_IDS,
    FLAG,
    FRACTION,
    LABELS,
    MODULES,
    NAME,
    NAMES,
    PEFT_CONFIG,
    QUESTIONS,
    SITE_PATHS,
    SITE_SETTINGS,
    SITES,
    SIZES,
    TARGETS,
    TEXT,
    TRACKERS,
    Kind,
    number,
    one_of,
    optional,
    plain,
    sort_sites,
    whole_number,
)
from scaling_fl.experiment.parameters import OF_OPTIONS, OPTIONS, find_defaults
from scaling_fl.experiment.plugins import import_plugins
from scaling_fl.federation.aggregation import COMM_DTYPES
from scaling_fl.federation.cohorts import WEIGHTS
from scaling_fl.federation.site import TRAINERS
from scaling_fl.federation.strategies import STRATEGIES
from scaling_fl.models.adapters import ADAPTERS, MEANS
from scaling_fl.models.compute import ATTENTION
from scaling_fl.models.loading import model_defaults, trained_with
from scaling_fl.records.best import DIRECTIONS
from scaling_fl.storage import host_path
from scaling_fl.training.optimisers import OPTIMISERS
from scaling_fl.training.schedules import SCHEDULES

NOT_GIVEN: Any = object()  # the default takes its place; None is a value
# Names that modules of `plugins` may add to, by setting.
EXTENSIBLE = {
    **{"task_name": "TASKS", "train_path": "DATASETS", "model": "MODELS", "partition": "PARTITIONERS"},
    **{"strategy": "STRATEGIES", "optimiser": "OPTIMISERS", "trainer": "TRAINERS"},
}
# What `site_settings` may name.
OF_SITES = ("learning_rate", "num_local_epochs", "local_steps", "batch_size", "gradient_accumulation")
# As the defaults of others depend on them.
RESOLVED_FIRST = ("plugins", "task_name", "model", "train_path", "iid_split")
OF_TASKS = ("model", "train_path")  # of the names above, those of which a task may have its own default
LARGE = 1e36  # torch refuses factors that float32 does not hold, and Adam divides its own by 0.1 first


def setting(default: Any, kind: Kind, help_: str, *, may_change: bool = False, page: str = "settings") -> Any:
    """Return a field of `Settings`.

    Args:
        default: the value, or a function without arguments that returns it. A task or model may have its own.
        kind: what it accepts.
        help_: a line for users.
        may_change: a resumed run may have another value.
        page: of docs/, which has it in its table.
    """
    metadata = {"default": default, "kind": kind, "help": help_, "may_change": may_change, "page": page}
    return field(default=NOT_GIVEN, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked to do. What is not given takes the default of the task, the model, and the chosen options."""

    # fmt: off
    site_ids: list[int] = setting([0, 0, 0, 0], DEVICE_IDS, "the GPU id of each site of this node; an id given twice hosts two sites. Without a GPU the ids name CPU slots", may_change=True)
    num_sites: int | None = setting(None, optional(whole_number(1)), "how many sites there are in all; they use the entries of all nodes' `site_ids` in turn, so `num_sites=1000` simulates a thousand on one device. None: one for each entry, or for each name in `site_column`", may_change=True)
    centralised: bool = setting(False, FLAG, "train on the examples of all sites as one site, without a federation, as the baseline of a federated run; see [Centralised runs](centralised.md)")
    num_rounds: int = setting(3, whole_number(0), "how often the sites train and their weights are averaged", may_change=True)
    sites_per_round: int | float | None = setting(None, optional(COUNT_OR_FRACTION), "how many sites take part in a round, sampled for each: a whole number, or a fraction below or equal to 1.0 of the eligible sites, rounded down, but at least `min_sites`. None: all. See [Cohorts](cohorts.md)")
    eligible_sites: list | None = setting(None, optional(SITES), "the sites that may take part in training, by number, or by name where sites have names. None: all", may_change=True)
    evaluation_sites: list | None = setting(None, optional(SITES), "the sites, by number or name, on whose test and validation examples the global model is evaluated. None: all; where sites are sampled from more than 100, those of the round", may_change=True, page="evaluation")
    site_test_fraction: float | None = setting(None, optional(FRACTION), "the fraction of each site's data that the site does not train on and is evaluated on, as in 0.2; with `site_paths`, of sites without a test file. None: none. See [Evaluation](evaluation.md)", page="evaluation")
    validation_fraction: float | None = setting(None, optional(FRACTION), "the fraction of the rest of each site's data by which the best round is chosen, in place of the test examples. None: none", page="evaluation")
    central_evaluation: bool = setting(True, FLAG, "evaluate on the common test set, if there is one", page="evaluation")
    evaluate_local: bool = setting(False, FLAG, "evaluate the model of each site before its weights are averaged, too, which shows what the site gains", may_change=True, page="evaluation")
    evaluate_every: int = setting(1, whole_number(1), "evaluate before training, after every so many-th round, and after the last one", may_change=True, page="evaluation")
    best_metric: str | None = setting("validation.loss", optional(one_of(DIRECTIONS)), "by which the best round is chosen, whose model is kept in `best/`. None: keep none", may_change=True, page="evaluation")
    early_stopping_rounds: int | None = setting(None, optional(whole_number(1)), "end the run when so many evaluated rounds have come after the best one. None: do not", may_change=True, page="evaluation")
    weight_by: str = setting("examples", one_of(WEIGHTS), "the weight of a site in the mean: the number of `examples` that it trained on, of `tokens` that a language model learned to predict, or the same for all `sites`")
    num_local_epochs: int = setting(2, whole_number(1), "passes of a site over its data in a round")
    local_steps: int | None = setting(None, optional(whole_number(1)), "train a site for so many steps in a round in place of epochs; it goes on where it stopped in its last round. Its weight is the examples of these steps, at most all it has")
    site_deadline_s: float | None = setting(None, optional(number(above=0)), "stop the training of a site at the end of a step after so many seconds; its weight is what it trained on. Gives up promises 1 and 2")
    batch_size: int = setting(32, whole_number(1), "examples in a training step of a site")
    val_batch_size: int = setting(64, whole_number(1), "most examples in an evaluation batch", may_change=True)
    learning_rate: float = setting(2e-5, number(above=0), "of the sites' optimiser")
    optimiser: str = setting("sgd", one_of(OPTIMISERS), "of the sites: `sgd`, `adamw`, or `adamw8bit` ([with a state in 8 bits](quantised.md#adamw-with-a-state-in-8-bits))")
    optimiser_state: str = setting("reset", one_of(("reset", "keep")), "`reset`: a site starts each round with a new optimiser; `keep`: it goes on with that of its last round, whose state is a file on the disk of its node", page="local_training")
    lr_schedule: str = setting("constant", one_of(SCHEDULES), "how `learning_rate` changes over all rounds: `constant`, `linear` or `cosine`", page="local_training")
    lr_schedule_rounds: int | None = setting(None, optional(whole_number(1)), "of `linear` and `cosine`: the rounds in which the rate falls to `min_learning_rate`; a resumed run has the same. None: `num_rounds`", page="local_training")
    min_learning_rate: float | None = setting(None, optional(number(least=0)), "of `linear` and `cosine`: the rate to which they fall; None: 0", page="local_training")
    lr_per_round: bool | None = setting(None, optional(FLAG), "of `linear` and `cosine`: keep the rate of the first step of a round in all of it; None: False", page="local_training")
    warmup_steps: int | None = setting(None, optional(whole_number(0)), "the first steps of a site, in which the rate rises from 0 to `learning_rate`; None: 0", page="local_training")
    gradient_accumulation: int = setting(1, whole_number(1), "batches in a step of a site's optimiser: a step is that of a batch so many times as large, in the memory of one", page="local_training")
    max_grad_norm: float | None = setting(None, optional(number(above=0)), "scale the gradient of a step to this norm if it is longer; None: do not", page="local_training")
    weight_decay: float | None = setting(None, optional(number(least=0, below=LARGE)), "of the sites' optimiser, on all trained weights; None: the optimiser's own, 0 of `sgd` and 0.01 of the others", page="local_training")
    activation_checkpointing: bool = setting(False, FLAG, "compute the activations of each layer again in the backward pass in place of keeping them: less memory, more time, the same bits", may_change=True, page="local_training")
    attn_implementation: str | None = setting(None, optional(one_of(ATTENTION)), "the kernels of attention: `eager`, `sdpa` or `flex_attention`; None: what transformers chooses for the model", page="local_training")
    autocast: str | None = setting(None, optional(one_of(("bfloat16",))), "train with matrix products in this type, and weights and their changes in float32; None: all in float32", page="local_training")
    force_autocast: bool = setting(False, FLAG, "use `autocast` on devices that have no instructions for it, too, where it is several times slower", may_change=True, page="local_training")
    log_every_steps: int | None = setting(None, optional(whole_number(1)), "record the loss and the learning rate of the sites for every so many steps of their optimisers, by a number of the step that goes on over all rounds. None: do not", may_change=True, page="local_training")
    log_sites_by_step: bool = setting(False, FLAG, "of `log_every_steps`: record those of each site, too", may_change=True, page="local_training")
    trainer: str = setting("default", one_of(TRAINERS, "default"), "what trains a site: `default`, or the name of a function that a module of `plugins` adds")
    site_settings: dict | None = setting(None, optional(SITE_SETTINGS), "`learning_rate`, `num_local_epochs`, `local_steps`, `batch_size` and `gradient_accumulation` of single sites, as in `{3:{'learning_rate':1e-5}}`. Sites have numbers from 0; `plan` prints them, which sites with `site_paths` get by the contents of their files")
    max_seq_len: int = setting(128, whole_number(1), "longer texts are cut to so many tokens")
    strategy: str = setting("fedavg", one_of(STRATEGIES), "how the mean moves the global weights: `fedavg`, `fedavgm`, `fedadagrad`, `fedadam`, `fedyogi`, `diloco`; see [Strategies](strategies.md)")
    server_learning_rate: float | None = setting(None, optional(number(above=0, below=LARGE)), "of the strategy; None: the strategy's default")
    server_momentum: float | None = setting(None, optional(number(least=0, below=1)), "of strategies with momentum, the beta1 of the adaptive ones; None: the strategy's default")
    server_beta2: float | None = setting(None, optional(number(least=0, below=1)), "of `fedadam` and `fedyogi`: how much of the mean of the squared drifts a round keeps; None: the strategy's default")
    server_tau: float | None = setting(None, optional(number(above=1e-18, below=1e18)), "of `fedadagrad`, `fedadam` and `fedyogi`: the drift below which they adapt less; None: the strategy's default")  # float32 holds its square
    proximal_mu: float = setting(0.0, number(least=0, below=LARGE), "strength of FedProx's pull of the local towards the global weights")
    comm_dtype: str = setting("exact", one_of(COMM_DTYPES), "what processes send each other: `exact` (64-bit fixed point), or `float32`, `bfloat16`, `float16`, `int8` (blocks of 256 drifts, a quarter of float32), which are smaller and give up promises 1 to 3")
    on_site_failure: str = setting("abort", one_of(("abort", "skip")), "what to do when a site fails or diverges: `abort` ends the run, `skip` leaves that site out of that round", may_change=True)
    min_sites: int = setting(1, whole_number(0), "the fewest sites of a round, if `sites_per_round` is a fraction; with `on_site_failure=skip` a run ends if fewer are left in a round, or less than 1/65536 of its examples. 0: a round of which no site is left is recorded, and moves nothing", may_change=True)
    task_name: str = setting("bbcnews", one_of(TASKS), "what is learned; see [Tasks](tasks.md)")
    site_paths: list | None = setting(None, optional(SITE_PATHS), "the files of each of this node's `site_ids`, for sites with data of their own, in place of `train_path` and `test_path`", may_change=True)
    train_path: str | None = setting(None, optional(TEXT), "the training file: a local path or any [fsspec](https://filesystem-spec.readthedocs.io) URL; of `instruct` also a nickname or hub id", may_change=True)
    test_path: str | None = setting(None, optional(TEXT), "the test file, of the common test set", may_change=True)
    text_column: str | None = setting(None, optional(TEXT), "the column of the texts; None: the task's own")
    label_column: str | None = setting(None, optional(TEXT), "the column of the labels; None: the task's own")
    labels: list | None = setting(None, optional(LABELS), "all possible labels, in the order of the classes, for tasks without labels of their own; None: those found, sorted")
    max_train_examples: int | None = setting(None, optional(whole_number(1)), "train on a random sample of so many; None: on all")
    max_test_examples: int | None = setting(None, optional(whole_number(1)), "evaluate on a random sample of so many; None: on all")
    max_train_examples_per_site: int | None = setting(None, optional(whole_number(1)), "each site trains on a random sample of so many of its examples; None: on all", page="evaluation")
    max_test_examples_per_site: int | None = setting(None, optional(whole_number(1)), "each site is evaluated on a random sample of so many of its test examples, or of the common test set if it has none of its own; None: on all of its own", page="evaluation")
    iid_split: bool = setting(True, FLAG, "False is another way to write `partition=by_label`", may_change=True)
    partition: str = setting("iid", one_of(PARTITIONERS), "how the data is partitioned; see [Partitions](partitions.md). It takes precedence over `iid_split`")
    template: str | None = setting(None, optional(one_of(TEMPLATES)), "how a conversation is written as one text: `alpaca`, `vicuna`, `flowertune`, `plain`, or `chat`, the tokenizer's own", page="instruct")
    train_on_prompt: bool = setting(False, FLAG, "learn to predict prompts, too", page="instruct")
    skip_long: bool = setting(False, FLAG, "leave out rows without an answer that has tokens of its own, and count them; False: refuse them", page="instruct")
    pack: bool = setting(False, FLAG, "lay the texts of a training batch in one row, without padding", page="instruct")
    score_by: str | None = setting(None, optional(one_of(("exact_match",))), "`exact_match` also lets the model answer, and compares its answers with those of the data", may_change=True, page="instruct")
    sample_questions: list | None = setting(None, optional(QUESTIONS), "questions that the model answers after each evaluation; the answers are printed and on the record", may_change=True, page="instruct")
    min_examples: int = setting(1, whole_number(1), "the fewest training examples that a site may have")
    dirichlet_alpha: float | None = setting(None, optional(number(above=0)), "of `dirichlet` and `dirichlet_sites`: the smaller, the more the sites differ; None: 0.5")
    shards_per_site: int | None = setting(None, optional(whole_number(1)), "of `partition=shards`; None: 2")
    labels_per_site: int | None = setting(None, optional(whole_number(1)), "of `partition=few_labels`: how many labels each site has; None: 2")
    sizes: str | list | None = setting(None, optional(SIZES), "of `partition=sizes`: `linear`, `exponential`, or a share for each site, as in `[3,1,1,1]`; None: `linear`")
    site_column: str | None = setting(None, optional(TEXT), "of `partition=natural`: the column of the training file with the name of each row's site")
    model: str = setting("minilm", TEXT, "a nickname, a hub id or a local folder; see [Models](models.md)")
    adapter: str | None = setting(None, optional(one_of(ADAPTERS)), "`lora`: train low-rank matrices beside the frozen model, and the head. None: train the model, or the adapter that `model` is", page="adapters")
    lora_rank: int | None = setting(None, optional(whole_number(1)), "of `adapter=lora`: the rank of the matrices A and B; None: 8", page="adapters")
    lora_alpha: float | None = setting(None, optional(number(above=0, below=LARGE)), "of `adapter=lora`: BA is multiplied by `lora_alpha / lora_rank`; None: 16", page="adapters")
    lora_dropout: float | None = setting(None, optional(number(least=0, below=1)), "of `adapter=lora`: of what goes into A, in training; None: 0", page="adapters")
    lora_targets: str | list | None = setting(None, optional(TARGETS), "of `adapter=lora`: the ends of the names of the modules that get an A and a B, or `all-linear`; None: those that peft has for the family", page="adapters")
    lora_modules_to_save: list | None = setting(None, optional(NAMES), "of `adapter=lora`: modules that are trained whole, with the head and what is newly initialised", page="adapters")
    use_dora: bool | None = setting(None, optional(FLAG), "of `adapter=lora`: train the norms of the weights apart from their directions (DoRA)", page="adapters")
    use_rslora: bool | None = setting(None, optional(FLAG), "of `adapter=lora`: multiply BA by `lora_alpha / sqrt(lora_rank)` (rsLoRA)", page="adapters")
    lora_mean: str | None = setting(None, optional(one_of(MEANS)), "how LoRA is averaged: `ab`, `freeze_a` or `alternate`; None: `ab`", page="adapters")
    adapter_config: str | dict | None = setting(None, optional(PEFT_CONFIG), "in place of `adapter`: any method of peft, as the path or the contents of its `adapter_config.json`", may_change=True, page="adapters")  # its contents may not
    quantise: int | None = setting(None, optional(BITS), "of a model with an adapter: keep the frozen linear layers in 8 or 4 bits (bitsandbytes: LLM.int8(); NF4 with double quantisation); None: do not", page="quantised")
    base_dtype: str | None = setting(None, optional(one_of(("float32", "bfloat16"))), "of a model with an adapter: the type of the other frozen weights; None: `float32`", page="quantised")
    merge: bool = setting(False, FLAG, "save the model with the adapter added to its weights, too", may_change=True, page="adapters")
    seed: int = setting(1, whole_number(0, below=2**32), "of all randomness in training")  # Sacred seeds numpy with it
    data_seed: int = setting(1, whole_number(0), "of the samples and the partition")
    plugins: list | None = setting(None, optional(MODULES), "modules of yours, in the current folder or installed, that every rank imports first, to add tasks, models, partitions, strategies, optimisers and trainers. Resuming compares the source of these files")
    job_name: str | None = setting(None, optional(TEXT), "the name under which MongoDB continues a run that is resumed", may_change=True)
    checkpoints_dir: str | None = setting(None, optional(TEXT), "where each round leaves a checkpoint, and from where a run resumes: a folder or any fsspec URL. See [Resuming](resuming.md)", may_change=True)
    keep_checkpoints: int | None = setting(None, optional(whole_number(1)), "how many of the last checkpoints to keep; None: all", may_change=True)
    report: bool = setting(True, FLAG, "write `report.html` at the end of the run", may_change=True)
    trackers: list | None = setting(None, optional(TRACKERS), "what else gets the settings and rounds; see [Trackers](trackers.md)", may_change=True)
    track_sites: bool = setting(False, FLAG, "trackers get what is about single sites, too", may_change=True)
    author: str = setting(lambda: os.environ.get("USER") or "unknown", NAME, "written into the record", may_change=True)
    # fmt: on

    def __post_init__(self) -> None:
        def default(name: str) -> Any:
            value = FIELDS[name]["default"]
            return value() if callable(value) else value

        def resolve(name: str, value: Any) -> None:
            given = getattr(self, name)
            object.__setattr__(self, name, plain(value if given is NOT_GIVEN else given))

        for name in RESOLVED_FIRST:
            of_task = task_defaults(str(self.task_name)) if name in OF_TASKS else {}
            if name == "train_path" and self.site_paths not in (NOT_GIVEN, None):
                of_task = {}
            resolve(name, of_task.get(name, default(name)))
        object.__setattr__(self, "plugins", _import_plugins(self.plugins))
        of_others = {"partition": "iid" if self.iid_split else "by_label"}
        of_others |= task_defaults(str(self.task_name)) | model_defaults(str(self.model))
        generates = is_generative(str(self.task_name))
        of_others |= data_defaults(self.train_path) if generates else {}
        of_others |= of_training(self.model)  # what it has learned goes before what suits the data
        if unknown := min(of_others.keys() - FIELDS.keys(), default=None):
            raise ValueError(
                f"{unknown!r}: expected the name of a setting, got another one among the defaults of task_name="
                f"{self.task_name!r}, model={self.model!r} or train_path={self.train_path!r}"
            )
        if not generates:
            of_others = {name: value for name, value in of_others.items() if FIELDS[name]["page"] != "instruct"}
        if self.adapter_config not in (NOT_GIVEN, None):
            of_others.pop("adapter", None)
        for name in OPTIONS:
            resolve(name, of_others.get(name, default(name)))
        of_options = {key: value for name in OPTIONS for key, value in find_defaults(name, getattr(self, name)).items()}
        for name in FIELDS:
            is_ignored = name in OF_OPTIONS and name not in of_options
            resolve(name, default(name) if is_ignored else of_others.get(name, default(name)))
            if getattr(self, name) is None:
                object.__setattr__(self, name, of_options.get(name))
        if self.lr_schedule_rounds is None and "lr_schedule_rounds" in of_options:
            object.__setattr__(self, "lr_schedule_rounds", self.num_rounds or 1)
        object.__setattr__(self, "site_settings", sort_sites(self.site_settings))


FIELDS: dict[str, Mapping[str, Any]] = {field.name: field.metadata for field in fields(Settings)}


def _import_plugins(names: Any) -> Any:
    """Import the modules of the setting, unless it is refused later."""
    if not names or not FIELDS["plugins"]["kind"].accepts(names):
        return names or None
    import_plugins(names)
    return list(names)


def of_training(model: Any) -> dict[str, Any]:
    """Return the settings that a local folder with a model says the model was trained with; none of other models."""
    folder = host_path(str(model))
    return trained_with(folder) if os.path.isdir(folder) else {}


def of_site(settings: Settings, site: int | None) -> dict[str, Any]:
    """Return the settings that the training of a site follows; None: of a site without settings of its own."""
    common = {name: getattr(settings, name) for name in (*OF_SITES, "optimiser", "proximal_mu", "seed")}
    return common | (settings.site_settings or {}).get(site, {})
