"""`deltaw chat`: a conversation in the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from deltaw.cli import show
from deltaw.cli.flags import Chat
from deltaw.cli.opening import NO_END, as_trained, open_model
from deltaw.config import DataConfig, GenerateConfig
from deltaw.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

    from deltaw.model.pretrained import Pretrained

_COMMANDS = {
    "/base": "use the base alone",
    "/adapter": "use the adapter again",
    "/system TEXT": "set the system message, and start over; without TEXT there is none",
    "/temperature T": "sample at this temperature; at 0 each token is the likeliest",
    "/retry": "answer the last message again, another way",
    "/save FILE": "write the conversation as a record to train on",
    "/new": "start over",
    "/help": "show this",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}
# What other programs call them
_ALIASES = {
    "/exit": "/quit", "/bye": "/quit", "/q": "/quit", "/clear": "/new", "/reset": "/new", "/regen": "/retry",
    "/regenerate": "/retry", "/?": "/help", "/temp": "/temperature",
}  # fmt: skip


@dataclass
class _Talk:
    """A conversation as it goes on."""

    loaded: Pretrained
    adapter: str | None
    system: str | None
    generation: GenerateConfig
    messages: list[dict[str, str]] = field(default_factory=list)
    """The turns after the system message."""
    tries: int = 0
    """Answers so far to the last message, beside the first one."""


def run(command: Chat) -> None:
    """Run the command."""
    show.quiet_libraries()
    adapter, trust = command.opening.adapter, command.opening.trust_remote_code
    task = as_trained(DataConfig(), adapter, command.model, trust_remote_code=trust).task
    if task != "causal":
        raise DataError(f"A chat needs a causal language model, and the task here is {task}. Use deltaw generate.")
    loaded = open_model(command.model, command.opening)
    if not loaded.tokenizer.chat_template:
        raise DataError(f"{command.model} has no chat template. Use deltaw generate for plain prompts.")
    talk = _Talk(loaded, adapter, as_trained(DataConfig(system=command.system), adapter).system, command.generation)
    show.prose(f"{command.model}{f' with {adapter}' if adapter else ''}. /help shows the commands.", style="dim")
    from deltaw.data import turn_ends

    if not turn_ends(loaded.tokenizer):
        show.prose(NO_END, style="yellow")
    while True:
        try:
            text = show.out.input("[bold cyan]you[/] › ", markup=True).strip()
        except EOFError:
            show.out.print()
            return
        if _ALIASES.get(text, text) == "/quit":
            return
        if text.startswith("/"):
            _obey(talk, text)
        elif text:
            talk.tries = 0
            _answer(talk, [*talk.messages, {"role": "user", "content": text}])


def _obey(talk: _Talk, text: str) -> None:
    """Do what a line with a slash asks for."""
    word, _, rest = text.partition(" ")
    word, rest = _ALIASES.get(word, word), rest.strip()
    if word == "/new":
        talk.messages = []
    elif word in ("/base", "/adapter"):
        _switch(talk.loaded.model, word == "/adapter", talk.adapter)
    elif word == "/system":
        talk.system, talk.messages = rest or None, []
        show.out.print("A new conversation, with this system message." if rest else "A new conversation.", style="dim")
    elif word == "/temperature":
        _set_temperature(talk, rest)
    elif word == "/retry" and talk.messages:
        talk.tries += 1
        if not talk.generation.temperature:
            show.out.print("At temperature 0 it says the same again; /temperature 0.7 changes that.", style="dim")
        _answer(talk, talk.messages[:-1])
    elif word == "/retry":
        show.out.print("There is no answer yet.", style="dim")
    elif word == "/save":
        _save(talk, rest)
    else:
        if word != "/help":
            show.out.print(f"There is no {word}.", style="dim")
        width = max(map(len, _COMMANDS))
        for name, what in _COMMANDS.items():
            show.out.print(f"  {name:<{width}}  {what}", style="dim")


def _set_temperature(talk: _Talk, text: str) -> None:
    try:
        talk.generation = dataclasses.replace(talk.generation, temperature=float(text))
    except (ValueError, ConfigError):
        show.out.print(
            f"{text or 'Nothing'} is no temperature: give a number from 0 on, as /temperature 0.7.", style="yellow"
        )


def _save(talk: _Talk, path: str) -> None:
    """Add the conversation to a JSONL file of records."""
    if not path or not talk.messages:
        show.out.print(
            "Give a file: /save chats.jsonl." if talk.messages else "There is nothing to save yet.", style="dim"
        )
        return
    record = json.dumps({"messages": _whole(talk, talk.messages)}, ensure_ascii=False)
    try:
        with Path(path).expanduser().open("a", encoding="utf-8") as file:
            file.write(record + "\n")
    except OSError as error:
        show.out.print(f"{path} cannot be written: {error.strerror}.", style="yellow", soft_wrap=True)
    else:
        show.out.print(f"Added to {path}.", style="dim", soft_wrap=True)


def _whole(talk: _Talk, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return messages with the system message before them, if there is one."""
    return [*([{"role": "system", "content": talk.system}] if talk.system else []), *messages]


def _switch(model: nn.Module, on: bool, adapter: str | None) -> None:
    """Use the adapter, or the base alone."""
    from deltaw.model.summary import adapters
    from deltaw.model.switch import use

    if adapter is None:
        show.out.print("There is no adapter: start with --adapter FOLDER.", style="dim")
        return
    use(model, adapters(model)[0] if on else None)
    show.out.print("Now with the adapter." if on else "Now the base alone.", style="dim")


def _answer(talk: _Talk, turn: list[dict[str, str]]) -> None:
    """Answer the last message of these, and take both into the conversation. Ctrl-C stops the answer, which is not taken."""
    try:
        reply = _generated(_in_use(talk.loaded), _whole(talk, turn), talk.generation, talk.tries)
    except DataError as error:
        show.out.print(f"{error} /new starts over.", style="yellow")
    except KeyboardInterrupt:
        show.out.print("\nStopped.", style="dim")
    else:
        talk.messages = [*turn, {"role": "assistant", "content": reply}]
        if not reply.strip():
            what = "nothing but white space" if reply else "nothing: it ended at once"
            show.prose(f"The model said {what}. /temperature 0.7 and /retry draw another answer.", style="yellow")


def _in_use(loaded: Pretrained) -> Pretrained:
    """The model with the tokenizer of the adapter, or of the base while no adapter is used."""
    from deltaw.model.summary import adapters

    return loaded if adapters(loaded.model).active else loaded.of_base()


def _generated(loaded: Pretrained, messages: list[dict[str, str]], generation: GenerateConfig, tries: int) -> str:
    """Generate the reply, and show it while it is written. Another number of tries draws another reply, if it is sampled."""
    import torch

    from deltaw.data import Message, prompt_ids, turn_ends
    from deltaw.layers.ops.seeding import mixed
    from deltaw.model.ends import in_use
    from deltaw.model.generate import Generates, drawing, settings, streamer, too_long, until_end, watched

    ids = prompt_ids([Message(m["role"], m["content"]) for m in messages], loaded.tokenizer)
    problem = too_long([ids], generation, loaded.model)
    if problem:
        raise DataError(problem)
    ends = [*turn_ends(loaded.tokenizer), *in_use(loaded.model)]
    config = settings(loaded.model, loaded.tokenizer, generation, ends)
    show.out.print("[bold magenta]model[/] › ", end="", markup=True)
    seed = mixed(generation.seed, len(messages), tries)  # the same question twice may have two answers
    model = cast(Generates, loaded.model)
    prompt = torch.tensor([ids], device=loaded.model.device)
    mask = torch.ones_like(prompt)
    drawn = drawing(loaded.model, generation, seed)
    with torch.no_grad(), drawn, watched(loaded.model, prompt, mask) as watch:
        out = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            generation_config=config,
            logits_processor=watch,
            streamer=streamer(loaded.tokenizer, config, show.piece) if generation.beams == 1 else None,
        )
    reply = loaded.tokenizer.decode(until_end(out[0, len(ids) :].tolist(), config), skip_special_tokens=True)
    show.out.print(reply if generation.beams > 1 else "", soft_wrap=True)
    return reply
