"""Every setting of `predistill dump`; flags are these names in kebab-case.

Nothing heavy is imported: the command line reads this file to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..store.errors import ConfigError
from ..store.lease import KINDS as LEASES
from ..store.lease import TIMEOUT as LEASE_TIMEOUT
from ..store.sizes import parse_size
from .inside.layers import EXACT, INNER, LAYERED, SQUARE, STORAGES, attention_source, check_layers
from .paths import looks_like_path, named_paths
from .tasks import REFUSED, TASKS

DTYPES = ("float16", "bfloat16", "float32", "int8")
TEACHER_DTYPES = ("auto", "float16", "bfloat16", "float32")
POSITIONS = ("all", "completion")
PROBLEM_TYPES = ("auto", "single_label_classification", "multi_label_classification", "regression")
LABEL_ORDERS = ("check", "by-name", "by-id")
CHOSEN_BY_BUDGET = ("top_k_logits", "top_p", "sampled_logits", "sample_temperature", "dtype")
MOST_DRAWS = 255  # the draws of one id are stored in a byte
COLDEST, HOTTEST = 1e-3, 1e6  # temperatures that train takes
AUTO = "auto"
NO_COLUMN = "none"
OF_TEXT = (
    "text_column", "text_pair_column", "max_length", "tokens_per_batch", "budget", "attention_storage", "tp_plan",
)  # fmt: skip
_WHOLE_NUMBERS = {
    "max_length": 1, "tokens_per_batch": 1, "shard_size": 1, "budget": 1, "top_k_logits": 0, "sampled_logits": 1,
    "doc_stride": 0, "ray_workers": 1, "batch_size": 1, "views": 1, "max_samples": 1,
}  # fmt: skip


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _list(default: list[Any], help: str, **more: Any) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": help, **more})


def _needed(help: str, **more: Any) -> Any:
    return field(metadata={"help": help, **more})


@dataclass
class DumpConfig:
    """What is run over what, and what is kept. Raises ConfigError for values that cannot be."""

    teacher: str = _needed("The fine-tuned model to run: a Hub id or a folder.")
    dataset: str = _needed(
        "Hub id, folder, or file (csv, tsv, json, jsonl, parquet, arrow, conll; .gz too), or several as "
        "train=PATH,validation=PATH. A lone file is train."
    )
    task: str = _needed("What the teacher does.", choices=tuple(TASKS), refused=REFUSED)
    output_dir: str = _needed("Folder of the store; the same command again continues it.")
    dataset_name: str | None = _setting(None, "Configuration of a Hub dataset, as glue has sst2.")
    dataset_revision: str | None = _setting(None, "Commit, branch or tag of a Hub dataset.")
    teacher_revision: str | None = _setting(None, "Commit, branch or tag of a Hub teacher.")
    split: list[str] = _list([], "Splits to dump. Default: all that the dataset has.")
    text_column: str | None = _setting(
        None,
        "Column of the text. Default: text; of words tokens; of questions question; for language models text, "
        "messages, or prompt and completion, where there.",
    )
    text_pair_column: str | None = _setting(
        None, "Column of the second text, for sentence pairs; of questions context."
    )
    label_column: str = _setting(
        AUTO,
        "Column of the labels; auto takes label or labels where there, of words ner_tags, pos_tags, chunk_tags, tags "
        "or labels, of questions answers; none leaves rows unlabelled.",
    )
    label_names: list[str] = _list([], "Names of the classes in the teacher's order, where its config lacks them.")
    label_order: str = _setting(
        "check",
        "Where dataset and teacher have the same class names in another order: check refuses, by-name converts the "
        "dataset's labels to the teacher's order, by-id takes them as they are.",
        choices=LABEL_ORDERS,
    )
    problem_type: str = _setting(
        AUTO, "Kind of head; auto asks the teacher's config, then the labels.", choices=PROBLEM_TYPES
    )
    image_column: str = _setting(AUTO, "Column of the images; auto takes the only one there is.")
    mask_column: str = _setting(
        AUTO, "Column of masks of images; auto takes mask, annotation or label where it is one of images; none: none."
    )
    ignore_index: int = _setting(255, "Class of pixels in masks that have none.")
    views: int = _setting(1, "Random views of each image of the split train; other splits have one plain view.")
    view_transforms: list[str] = _list(
        [], "What views are drawn of: crop, flip, mixup, cutmix. Default: crop,flip with --views above 1."
    )
    crop_scale: list[float] = _list([0.08, 1.0], "Least and largest share of an image that a crop takes.")
    view_seed: int = _setting(0, "Seed of the views; the same seed gives the same views.")
    fields: list[str] = _list(
        ["logits"], f"Teacher outputs to keep, any of logits, {', '.join(INNER)}: all but logits and pooled by layer."
    )
    layers: str | None = _setting(
        None,
        "Layers to keep: all, last, uniform:4 or 0,3,6. 0 is the embeddings, n is after block n, or inside it for "
        "attentions; uniform:4 is what a student of 4 blocks pairs with, embeddings included. Default: all.",
    )
    attention_storage: str = _setting(
        EXACT,
        "How attentions and their scores are kept: exact; queries-keys, from which training makes them again; or "
        "head-mean. predistill plan says what each takes and loses.",
        choices=STORAGES,
    )
    capture: list[str] = _list(
        [], "Modules of the teacher, by name (bert.encoder.layer.3), whose outputs to keep beside the fields."
    )
    keep_columns: list[str] = _list([], "Source columns to carry into the store, for queries.")
    dtype: str = _setting(
        "float16",
        "How teacher outputs are stored; int8 is for what is inside the teacher and for the top k logits of language "
        "models, and leaves other logits in float16.",
        choices=DTYPES,
    )
    top_k_logits: int | None = _setting(
        None,
        "Logits to keep of each token, the largest; 0 keeps all. Default: 64, or all of a vocabulary of at most 1024.",
        unit="entries",
    )
    top_p: float | None = _setting(
        None, "Of the top k logits, keep only the largest that together have this probability.", unit="probability"
    )
    temperatures: list[float] = _list(
        [], "Temperatures, 1 aside, at which probabilities of kept logits shall be exact: 4 bytes a token for each."
    )
    sampled_logits: int | None = _setting(
        None, "Instead of the top k: draws from the teacher's distribution to keep of each token.", unit="draws"
    )
    sample_temperature: float = _setting(
        1.0, "Temperature to draw at; at another than 1, each draw carries the ratio that corrects for it."
    )
    packing: bool = _setting(False, "Fill rows of --max-length tokens with one document after another.")
    positions: str = _setting(
        "all", "Tokens to keep logits of: all, or those that predict a completion.", choices=POSITIONS
    )
    budget: int | None = _setting(
        None,
        "Size that the store may have: picks how logits of language models (top k, top p or draws, and dtype) and what "
        "is inside the teacher (dtype, attention storage) are kept, by fidelity.",
        unit="bytes",
    )
    max_length: int | None = _setting(
        None,
        "Longer inputs are cut, long contexts of questions read in windows. Default: what the teacher takes; of "
        "questions at most 384.",
        unit="tokens",
    )
    doc_stride: int | None = _setting(
        None,
        "Tokens of a long context that two neighbouring windows share. Default: 128, or a third of --max-length where "
        "that is less.",
        unit="tokens",
    )
    tokens_per_batch: int | None = _setting(
        None, "Size of a teacher batch, padding included. Default: 4096 on a CPU, 32768 elsewhere.", unit="tokens"
    )
    batch_size: int | None = _setting(
        None, "Images in a teacher batch. Default: by their size; on a CPU 20 of 224 x 224 pixels.", unit="images"
    )
    shard_size: int = _setting(256 * 10**6, "Size that shards are planned for.", unit="bytes")
    device: str = _setting(AUTO, "Where the teacher runs: auto, cpu, cuda, cuda:1, mps.")
    device_map: str | None = _setting(
        None, "Spread the teacher over all devices, by accelerate: auto, balanced, balanced_low_0, sequential."
    )
    tp_plan: str | None = _setting(
        None,
        "auto: split each layer of the teacher over the ranks of a torchrun, by transformers (tensor parallelism).",
    )
    teacher_dtype: str = _setting(
        AUTO, "What the teacher computes in; auto is what its weights are saved in.", choices=TEACHER_DTYPES
    )
    attention: str = _setting(AUTO, "The teacher's attention implementation: auto, eager, sdpa, flash_attention_2, …")
    compile: bool = _setting(False, "Compile the teacher with torch.compile: minutes to begin, faster after.")
    trust_remote_code: bool = _setting(False, "Run Python code that comes with the teacher.")
    dry_run: bool = _setting(False, "Say size and time, measured on a few rows, and write nothing.")
    overwrite: bool = _setting(False, "Empty a store of other settings first.")
    streaming: bool = _setting(
        False,
        "Read rows once, in order, as they come: never counted, nor prepared into the cache of `datasets`. The same "
        "command goes on where the source grew.",
    )
    max_samples: int | None = _setting(None, "Rows of each split to dump, the first ones. Default: all.", unit="rows")
    ray_workers: int | None = _setting(
        None,
        "Dump by so many Ray tasks, a GPU each where the cluster has any; all nodes must see --output-dir.",
        unit="workers",
    )
    lease: str = _setting(
        AUTO,
        "How workers that dump into one folder claim shards: lock, which ends with its process; heartbeat, for network "
        "file systems; auto looks at what the folder is on.",
        choices=LEASES,
    )
    lease_timeout: float = _setting(
        LEASE_TIMEOUT, "Without a heartbeat for so long, a worker is taken for dead.", unit="seconds"
    )

    def __post_init__(self) -> None:
        self.shard_size = parse_size(self.shard_size)
        self.budget = None if self.budget is None else parse_size(self.budget)
        for name in ("teacher", "dataset", "output_dir"):
            setattr(self, name, str(getattr(self, name)))
        self._check_choices()
        self._check_fields()
        self._check_numbers()
        self._check_known()
        self._check_logits()
        self._check_inner()
        self._check_streaming()
        self.text_column = self.text_column or TASKS[self.task].text_column
        self._check_devices()
        if looks_like_path(self.teacher) and not Path(self.teacher).expanduser().is_dir():
            raise ConfigError(f"--teacher {self.teacher}: a folder with a saved model expected; there is none")
        named_paths(self.dataset)

    def _check_choices(self) -> None:
        if self.task in REFUSED:
            raise ConfigError(f"--task: {REFUSED[self.task]}")
        allowed = {
            "task": tuple(TASKS), "dtype": self._dtypes(), "teacher_dtype": TEACHER_DTYPES,
            "problem_type": PROBLEM_TYPES, "label_order": LABEL_ORDERS, "positions": POSITIONS,
            "attention_storage": STORAGES,
        }  # fmt: skip
        for name, choices in allowed.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{_flag(name)} is one of {', '.join(choices)}; got {value!r}")
        for name in ("teacher", "dataset", "output_dir", "text_column"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ConfigError(f"{_flag(name)} is empty")
        for name in ("split", "keep_columns", "label_names", "fields", "capture"):
            values = getattr(self, name)
            if isinstance(values, str) or len(set(values)) < len(values):
                raise ConfigError(f"{_flag(name)} is a list of different names; got {values!r}")

    def _dtypes(self) -> tuple[str, ...]:
        known = TASKS[self.task].settings if self.task in TASKS else ()
        with_int8 = "top_k_logits" in known or self.keeps_inner
        return DTYPES if with_int8 else tuple(name for name in DTYPES if name != "int8")

    def _check_fields(self) -> None:
        supported = TASKS[self.task].fields
        unknown = [name for name in self.fields if name not in supported]
        if unknown or not self.fields:
            raise ConfigError(f"--fields {','.join(self.fields)}: {self.task} keeps {', '.join(supported)}")
        if self.layers is not None:
            check_layers(self.layers)
            if not set(self.fields) & set(LAYERED):
                kept = ", ".join(self.fields)
                raise ConfigError(
                    f"--layers {self.layers}: {kept} has no layers; leave it away, or keep some of {', '.join(LAYERED)}"
                )

    def _check_numbers(self) -> None:
        for name, least in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{_flag(name)} is a whole number from {least}; got {value!r}")
        asked = {"sample_temperature": [self.sample_temperature], "temperatures": self.temperatures}
        for name, value in ((name, value) for name, values in asked.items() for value in values):
            if not (isinstance(value, float | int) and COLDEST <= value <= HOTTEST):
                raise ConfigError(f"{_flag(name)}: numbers from {COLDEST:g} to {HOTTEST:g} expected; got {value!r}")
        if self.top_p is not None and not (isinstance(self.top_p, float | int) and 0 < self.top_p <= 1):
            raise ConfigError(f"--top-p is above 0 and at most 1; got {self.top_p!r}")
        if self.sampled_logits is not None and self.sampled_logits > MOST_DRAWS:
            raise ConfigError(f"--sampled-logits is at most {MOST_DRAWS}; got {self.sampled_logits}")

        if not (isinstance(self.lease_timeout, float | int) and self.lease_timeout >= 1):
            raise ConfigError(f"--lease-timeout is at least 1 second; got {self.lease_timeout!r}")

    def _check_known(self) -> None:
        """Settings of some tasks are refused for the others."""
        known = {*TASKS[self.task].settings, *(["budget"] if self.keeps_inner else [])}
        foreign = {name for task in TASKS.values() for name in task.settings} - known
        for one in fields(self):
            if one.name in foreign and self._given(one.name):
                raise ConfigError(f"{_flag(one.name)} is nothing that {self.task} knows; leave it away")
        if TASKS[self.task].of_images:
            self._check_images()

    def _check_images(self) -> None:
        """Settings of text are refused; a batch is of so many images, which count as a token each."""
        given = [name for name in OF_TEXT if self._given(name) and (name, self.tokens_per_batch) != (
            "tokens_per_batch", self.batch_size)]  # fmt: skip
        if given:
            raise ConfigError(f"{_flag(given[0])} is about text, and {self.task} reads images; leave it away")
        self.tokens_per_batch = self.batch_size
        if len(self.crop_scale) != 2 or not all(isinstance(one, float | int) for one in self.crop_scale):
            raise ConfigError(f"--crop-scale: two shares expected, as 0.08,1.0; got {self.crop_scale!r}")

    def _check_logits(self) -> None:
        """One way of keeping logits at a time."""
        if self.budget is not None:
            chosen = [name for name in (*CHOSEN_BY_BUDGET, "attention_storage") if self._given(name)]
            if chosen:
                raise ConfigError(f"--budget chooses {_flag(chosen[0])} itself; give one of them")
        if self.sampled_logits is not None and (self.top_k_logits is not None or self.top_p is not None):
            raise ConfigError("--sampled-logits is kept instead of --top-k-logits and --top-p; give one of them")
        if self.sampled_logits is not None and self.dtype == "int8" and not self.keeps_inner:
            raise ConfigError("--dtype int8 is for the top k logits, and --sampled-logits keeps draws; leave one away")
        if self.sample_temperature != 1 and self.sampled_logits is None:
            raise ConfigError(f"--sample-temperature {self.sample_temperature:g} is for --sampled-logits; give both")

    def _check_inner(self) -> None:
        """Of what is inside the teacher."""
        if self._given("attention_storage") and not set(self.fields) & set(SQUARE):
            raise ConfigError(
                f"--attention-storage {self.attention_storage}: nothing of {', '.join(SQUARE)} is kept; add one to "
                "--fields, or leave it away"
            )
        if self.keeps_inner and self.compile:
            raise ConfigError("--compile: a teacher whose inside is kept runs uncompiled; leave it away")
        if self.budget is None and self.attention not in (AUTO, "eager") and self.needs_eager:
            raise ConfigError(
                f"--attention {self.attention} does not tell its weights, and eager does; leave it away, or give "
                "--attention-storage queries-keys"
            )

    def _check_devices(self) -> None:
        """Of a teacher on several of them."""
        spread = {name: value for name in ("device_map", "tp_plan") if (value := getattr(self, name)) is not None}
        for name, value in spread.items():
            other = "--device" if self.device != AUTO else "--tp-plan" if len(spread) > 1 else None
            if other:
                raise ConfigError(f"{_flag(name)} {value} chooses devices, and so does {other}; give one of them")
        if self.tp_plan is None:
            return
        if self.tp_plan != AUTO:
            raise ConfigError(f"--tp-plan is auto; got {self.tp_plan!r}")
        split = [*(name for name in self.fields if name not in ("logits", "hidden_states")), *self.capture]
        if split:
            raise ConfigError(
                f"--tp-plan auto: each rank has a part of {split[0]} only; keep logits and hidden_states, or give "
                "--device-map auto instead"
            )
        for name in ("compile", "ray_workers"):
            if self._given(name):
                raise ConfigError(f"--tp-plan auto does not go with {_flag(name)}; leave one of them away")

    def _check_streaming(self) -> None:
        if not self.streaming:
            return
        if self.budget is not None and self.max_samples is None:
            raise ConfigError("--budget is of the whole store, and nobody knows how many rows come: give --max-samples")
        if mixes := [name for name in self.view_transforms if name in ("mixup", "cutmix")]:
            raise ConfigError(
                f"--view-transforms {mixes[0]} mixes any two images, and a stream has few at a time: leave --streaming "
                "away"
            )

    @property
    def keeps_inner(self) -> bool:
        """Is anything inside the teacher kept?"""
        return bool(self.capture or set(self.fields) & set(INNER))

    @property
    def needs_eager(self) -> bool:
        """Must the teacher run with eager attention?"""
        return attention_source(self.fields, self.attention_storage) == "eager"

    def _given(self, name: str) -> bool:
        """Is this setting another than its default?"""
        one = next(each for each in fields(self) if each.name == name)
        default = one.default_factory() if callable(one.default_factory) else one.default
        return getattr(self, name) != default


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
