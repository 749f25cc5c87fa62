"""Tasks that models learn: the next token, a class or a quantity for a text, a completion for an encoder, a class for an image.
Each task says how records become examples, what its loss is, and what a model answers. To add one: subclass `Task`, list it in
`TASKS`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import Encoded, Example, Record, Records, as_said, as_taught, encode, encode_prompts, prompt_ends
from deltaw.data.images import pixels
from deltaw.data.items import Input, Item, encode_images, encode_labelled, encode_seq2seq, encoder_inputs, texts
from deltaw.data.labels import are_quantities, class_indices, class_name, class_names, number, quantities
from deltaw.errors import DataError
from deltaw.layers.tree import evaluating, is_finite
from deltaw.model.generate import generate, too_long
from deltaw.model.inputs import check_ends, row_padding
from deltaw.model.pretrained import Pretrained, pad_id
from deltaw.model.switch import at_fault
from deltaw.training.losses import ClassLoss, CompletionLoss, DecoderLoss, Loss, RecordLoss, SquaredLoss

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Answer = str | int | float
"""A text, the number of a class, or a quantity."""
Told = Callable[[int], None]
"""Told how many records are done."""


class Passes(NamedTuple):
    """Passes over training records by their number. The limits are numbers of records (results/defaults.json).

    Few records are passed over more often, until the model has seen `enough`; many less often, until it has seen `plenty`.
    """

    usual: float
    enough: int
    most: float
    plenty: int

    def over(self, records: int) -> float:
        """Return the passes over so many records: whole ones, between 1 and `most`."""
        passes = min(max(self.usual, self.enough / records), self.most) if records else 1.0
        return float(round(max(1.0, min(passes, max(self.plenty, self.enough) / max(records, 1)))))


class Task(ABC):
    """A task's answers to what a run, an evaluation or a comparison asks."""

    name: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]
    """Forms of the records that it learns from."""
    unit: ClassVar[str] = "nats per supervised token"
    """The unit of its loss."""
    least_margin: ClassVar[float] = 0.005
    """A difference of losses below which nothing is given up. Of nats: an answer half a percent less likely."""
    counted: ClassVar[str] = "tokens"
    """The things that its speed counts."""
    answers: ClassVar[Literal["text", "class", "number"]]
    passes: ClassVar[Passes]
    """Passes over the records by default."""
    trivial: ClassVar[str] = ""
    """The answer of `trivial_loss` in words."""

    def usual_epochs(self, records: int) -> float:
        """Return the passes over so many training records by default."""
        return self.passes.over(records)

    @abstractmethod
    def encode(self, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        """Return every record as an example. Raises one DataError with all that cannot be."""

    @abstractmethod
    def loss(self, loaded: Pretrained) -> Loss:
        """Return the loss of the model as it is."""

    @abstractmethod
    def answer(
        self, loaded: Pretrained, records: Sequence[Record], data: DataConfig, generation: GenerateConfig, told: Told
    ) -> list[Answer]:
        """Return what the model says to each record."""

    @abstractmethod
    def wanted(self, record: Record, data: DataConfig) -> str | None:
        """Return the answer that the record has, of a class its name; None where it has none."""

    def trivial_loss(self, train: Sequence[Example | Item], valid: Sequence[Example | Item]) -> float | None:
        """Return the held-out loss of the best answer that looks at no record; None where only the base tells it."""
        return None

    def learnt(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[str | None]:
        """Return the answers that the records have, as a model that learnt them gives them."""
        return [self.wanted(record, data) for record in records]

    @abstractmethod
    def said(self, answer: Answer, data: DataConfig) -> str:
        """Return an answer as people read it."""

    def fits(self, loaded: Pretrained, record: Record, data: DataConfig, generation: GenerateConfig) -> bool:
        """Return whether the model has positions for this record and an answer."""
        return True


class Written(Task):
    """A task whose answers are texts that the model generates."""

    answers = "text"
    passes = Passes(usual=1, enough=300, most=10, plenty=30_000)

    @abstractmethod
    def prompts(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[list[int]]:
        """Return the token ids to generate each record's answer from."""

    def ends(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> Sequence[int]:
        """Return the tokens that end an answer, beside the model's."""
        return ()

    def answer(
        self,
        loaded: Pretrained,
        records: Sequence[Record],
        data: DataConfig,
        generation: GenerateConfig,
        told: Told,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Return what the model writes for each record; `on_text` is told the only one as it comes."""
        prompts, ends = self.prompts(loaded, records, data), self.ends(loaded, records, data)
        return [
            *generate(loaded.model, loaded.tokenizer, prompts, generation, ends=ends, on_done=told, on_text=on_text)
        ]

    def wanted(self, record: Record, data: DataConfig) -> str | None:
        return record.completion

    def learnt(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[str | None]:
        return [*as_said([record.completion or "" for record in records], loaded.tokenizer)]

    def said(self, answer: Answer, data: DataConfig) -> str:
        return str(answer)

    def fits(self, loaded: Pretrained, record: Record, data: DataConfig, generation: GenerateConfig) -> bool:
        return too_long(self.prompts(loaded, [record], data), generation, loaded.model) is None


class Causal(Written):
    """The next token of a text, given those before it."""

    name = "causal"
    forms = ("prompt", "chat", "instruction", "text")

    def encode(self, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        return encode(records, loaded.tokenizer, data)

    def loss(self, loaded: Pretrained) -> Loss:
        return CompletionLoss(loaded.model, pad_id(loaded.tokenizer))

    def prompts(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[list[int]]:
        return encode_prompts(records, loaded.tokenizer, data)

    def learnt(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[str | None]:
        return as_taught(records, loaded.tokenizer, data)

    def ends(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> Sequence[int]:
        return prompt_ends(records, loaded.tokenizer, data)


class Seq2Seq(Written):
    """A completion, given its prompt, by a model with an encoder and a decoder (T5, BART)."""

    name = "seq2seq"
    forms = ("prompt", "instruction")

    def encode(self, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        return encode_seq2seq(records, loaded.tokenizer, data)

    def loss(self, loaded: Pretrained) -> Loss:
        return DecoderLoss(loaded.model, pad_id(loaded.tokenizer))

    def prompts(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> list[list[int]]:
        return encoder_inputs(records, loaded.tokenizer, data)


class Scored(Task):
    """A task whose answers are read from the logits of a head, one row for each record."""

    unit = "nats per record"
    passes = Passes(usual=3, enough=5000, most=20, plenty=60_000)
    loss_class: ClassVar[type[RecordLoss]] = ClassLoss

    @abstractmethod
    def inputs(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> Sequence[Mapping[str, Input]]:
        """Return what the model takes for each record."""

    @abstractmethod
    def answers_of(self, logits: Tensor) -> Sequence[float]:
        """Return what logits [n, outputs] say, for each row."""

    def padding(self, loaded: Pretrained) -> int:
        """Return the token that fills the rows of a batch."""
        return row_padding(loaded.model, pad_id(loaded.tokenizer))

    def loss(self, loaded: Pretrained) -> RecordLoss:
        return self.loss_class(loaded.model, self.padding(loaded))

    def answer(
        self, loaded: Pretrained, records: Sequence[Record], data: DataConfig, generation: GenerateConfig, told: Told
    ) -> list[Answer]:
        items = [Item(row, 0, "") for row in self.inputs(loaded, records, data)]
        return [*self.answers_of(self.logits(loaded, items, generation.batch, told))]

    @torch.no_grad()
    def logits(self, loaded: Pretrained, items: Sequence[Item], batch: int, told: Told) -> Tensor:
        """Return the logits of each item, fp32 [n, outputs] on the CPU.

        Raises AdapterError or FileError where they are not finite.
        """
        loss = self.loss(loaded)
        order = loss.order(items)
        parts = []
        with evaluating(loaded.model):
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                inputs = loss.collate([items[i] for i in rows])
                parts.append(loss.logits(inputs).float().cpu())
                if not is_finite(parts[-1]):
                    raise at_fault(loaded.model, partial(loss.logits, inputs), name=loaded.name)
                told(start + len(rows))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def wanted(self, record: Record, data: DataConfig) -> str | None:
        return None if record.label is None else class_name(record.label)


class _OfTexts(Scored):
    """A scored task whose records are texts or pairs of texts."""

    forms = ("labelled",)

    def encode(self, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        encoded = encode_labelled(records, loaded.tokenizer, data)
        check_ends(loaded.model, [e.inputs["input_ids"] for e in encoded.examples], [e.place for e in encoded.examples])
        return encoded

    def inputs(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> Sequence[Mapping[str, Input]]:
        inputs = texts(records, loaded.tokenizer, data.max_length)[0]
        check_ends(loaded.model, [row["input_ids"] for row in inputs], [r.place for r in records])
        return inputs


class _OfClasses(Scored):
    """A scored task whose answers are classes: the likeliest one."""

    answers = "class"
    trivial = "giving each class its share of the training records, or all the same,"

    def trivial_loss(self, train: Sequence[Example | Item], valid: Sequence[Example | Item]) -> float:
        known, held = _targets(train), _targets(valid)
        counts = Counter(known)
        # One more of each class, so that one that no training record has is possible
        classes = len(counts | Counter(held))
        shares = sum(-math.log((counts[c] + 1) / (len(known) + classes)) for c in held) / max(1, len(held))
        return min(shares, math.log(max(1, classes)))

    def answers_of(self, logits: Tensor) -> Sequence[int]:
        return [int(i) for i in logits.argmax(-1)]

    def said(self, answer: Answer, data: DataConfig) -> str:
        return (data.labels or [])[int(answer)]


class Classification(_OfTexts, _OfClasses):
    """A class of a text, or of a pair of texts."""

    name = "classification"


class Regression(_OfTexts):
    """A quantity for a text, or for a pair of texts."""

    name = "regression"
    unit = "squared error per record"
    least_margin = 0.0
    answers = "number"
    loss_class: ClassVar[type[RecordLoss]] = SquaredLoss
    trivial = "the mean of the training records"

    def trivial_loss(self, train: Sequence[Example | Item], valid: Sequence[Example | Item]) -> float:
        known, held = _targets(train), _targets(valid)
        mean = sum(known) / max(1, len(known))
        return sum((value - mean) ** 2 for value in held) / max(1, len(held))

    def answers_of(self, logits: Tensor) -> Sequence[float]:
        return [float(v) for v in logits[:, 0]]

    def said(self, answer: Answer, data: DataConfig) -> str:
        return f"{answer:.4g}"


def _targets(examples: Sequence[Example | Item]) -> list[float]:
    """Return the classes or quantities of examples."""
    return [e.target for e in examples if isinstance(e, Item) and isinstance(e.target, int | float)]


class Image(_OfClasses):
    """A class of an image."""

    name = "image"
    forms = ("image",)
    counted = "images"

    def encode(self, records: Records, loaded: Pretrained, data: DataConfig) -> Encoded:
        return encode_images(records, loaded.tokenizer, data)

    def inputs(self, loaded: Pretrained, records: Sequence[Record], data: DataConfig) -> Sequence[Mapping[str, Input]]:
        return [{"pixel_values": values} for values in pixels(records, loaded.tokenizer)]

    def padding(self, loaded: Pretrained) -> int:
        return 0  # images have none


_ALL: tuple[Task, ...] = (Causal(), Seq2Seq(), Classification(), Regression(), Image())
TASKS = {task.name: task for task in _ALL}


def task_of(data: DataConfig) -> Task:
    """Return the task that the settings say; where they leave it open, the next token's."""
    return TASKS["causal" if data.task == "auto" else data.task]


def recognised(data: DataConfig, records: Records, config: PretrainedConfig | None) -> DataConfig:
    """Return `data` with the task that these records and a model of this config make, and the names of the classes.

    Raises DataError where they do not fit each other.
    """
    name = data.task if data.task != "auto" else _recognised(records, config, data)
    task = TASKS[name]
    if records.form not in task.forms:
        raise DataError(
            f"{records.source}: task {name} learns from {' or '.join(task.forms)} records, and these are {records.form} records."
        )
    labels = data.labels
    if task.answers != "class":
        if labels is not None:
            raise DataError(
                f"labels name classes, and task {name} has none. Leave labels out, or set task: classification."
            )
    elif labels is None:
        labels = _classes(records, config)
    elif len(set(labels)) != len(labels) or len(labels) < 2:
        divided = f" Blanks divide them: --labels {' '.join(labels[0].split(','))}" if "," in "".join(labels) else ""
        raise DataError(f"labels is {labels}; it must name at least two classes, each once.{divided}")
    if name == "regression" and len(records) > 1 and len({number(r.label) for r in records.items} | {None}) == 2:
        raise DataError(f"All labels of {records.source} are {records.items[0].label}: there is nothing to predict.")
    return dataclasses.replace(data, task=name, labels=labels)  # type: ignore[arg-type]


def check_labels(data: DataConfig, sets: Sequence[Records]) -> None:
    """Raise one DataError with every record, in any of the sets, whose label is none of the classes, or no number."""
    answers = task_of(data).answers
    problems = []
    for records in sets if answers != "text" else ():
        try:
            if answers == "class":
                class_indices(records.items, data.labels or [], records.source)
            else:
                quantities(records.items, records.source)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def _recognised(records: Records, config: PretrainedConfig | None, data: DataConfig) -> str:
    """Return the name of the task that the records' form and labels, and the model's config, make."""
    if records.form == "image":
        return "image"
    if records.form == "labelled":
        return (
            "regression" if data.labels is None and are_quantities(records.items, records.source) else "classification"
        )
    encodes = bool(getattr(config, "is_encoder_decoder", False)) and records.form in Seq2Seq.forms
    return "seq2seq" if encodes else "causal"


def _classes(records: Records, config: PretrainedConfig | None) -> list[str]:
    """Return the records' classes, in the order of the model's head where it has one for these."""
    of_records = class_names(records.items, records.source)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith(("ForSequenceClassification", "ForImageClassification")):
        names: Mapping[int, str] = getattr(config, "id2label", None) or {}
        of_head = [class_name(names[i]) for i in sorted(names)]
        if set(of_records) <= set(of_head):
            return of_head
    return of_records
