"""`deltaw chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from deltaw.cli import show
from deltaw.cli.flags import Chat
from deltaw.cli.opening import NO_END, as_trained, open_model
from deltaw.config import DataConfig
from deltaw.errors import DataError, visible

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

    from deltaw.model.pretrained import Pretrained

_HELP = "/base and /adapter switch, /new starts over, /quit or Ctrl-D ends."


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
    system = as_trained(DataConfig(system=command.system), adapter).system
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    show.prose(f"{command.model}{f' with {adapter}' if adapter else ''}. {_HELP}", style="dim")
    from deltaw.data import turn_ends

    if not turn_ends(loaded.tokenizer):
        show.prose(NO_END, style="yellow")
    while True:
        try:
            text = show.out.input("[bold cyan]you[/] › ", markup=True).strip()
        except EOFError:
            show.out.print()
            return
        if text == "/quit":
            return
        if text == "/new":
            messages = list(start)
        elif text in ("/base", "/adapter"):
            _switch(loaded.model, text == "/adapter", adapter)
        elif text.startswith("/"):
            show.out.print(f"There is no {text}. {_HELP}", style="dim")
        elif text:
            turn = [*messages, {"role": "user", "content": text}]
            try:
                messages = [*turn, {"role": "assistant", "content": _answer(_in_use(loaded), turn, command)}]
            except DataError as error:
                show.out.print(f"{error} /new starts over.", style="yellow")


def _switch(model: nn.Module, on: bool, adapter: str | None) -> None:
    """Use the adapter, or the base alone."""
    from deltaw.model.summary import adapters
    from deltaw.model.switch import use

    if adapter is None:
        show.out.print("There is no adapter: start with --adapter FOLDER.", style="dim")
        return
    use(model, adapters(model)[0] if on else None)
    show.out.print("Now with the adapter." if on else "Now the base alone.", style="dim")


def _in_use(loaded: Pretrained) -> Pretrained:
    """The model with the tokenizer of the adapter, or of the base while no adapter is used."""
    from deltaw.model.summary import adapters

    return loaded if adapters(loaded.model).active else loaded.of_base()


def _answer(loaded: Pretrained, messages: list[dict[str, str]], command: Chat) -> str:
    """Generate the reply, and show it while it is written."""
    import torch

    from deltaw.data import Message, prompt_ids, turn_ends
    from deltaw.layers.ops.seeding import mixed
    from deltaw.model.ends import in_use
    from deltaw.model.generate import Generates, drawing, settings, too_long, until_end, watched

    ids = prompt_ids([Message(m["role"], m["content"]) for m in messages], loaded.tokenizer)
    problem = too_long([ids], command.generation, loaded.model)
    if problem:
        raise DataError(problem)
    ends = [*turn_ends(loaded.tokenizer), *in_use(loaded.model)]
    config = settings(loaded.model, loaded.tokenizer, command.generation, ends)
    show.out.print("[bold magenta]model[/] › ", end="", markup=True)
    seed = mixed(command.generation.seed, len(messages))  # the same question twice may have two answers
    model = cast(Generates, loaded.model)
    prompt = torch.tensor([ids], device=loaded.model.device)
    mask = torch.ones_like(prompt)
    drawn = drawing(loaded.model, command.generation, seed)
    with torch.no_grad(), drawn, watched(loaded.model, prompt, mask) as watch:
        out = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            generation_config=config,
            logits_processor=watch,
            streamer=_streamer(loaded.tokenizer, config) if command.generation.beams == 1 else None,
        )
    reply = loaded.tokenizer.decode(until_end(out[0, len(ids) :].tolist(), config), skip_special_tokens=True)
    if command.generation.beams > 1:
        show.out.print(reply, soft_wrap=True)
    return reply


def _streamer(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> TextStreamer:
    """A streamer that shows a reply up to its end token."""
    from transformers import TextStreamer

    from deltaw.model.generate import until_end

    class Reply(TextStreamer):
        def put(self, value: Tensor) -> None:
            if self.next_tokens_are_prompt or until_end(value.flatten().tolist(), config):
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end)

    return Reply(tokenizer, skip_prompt=True, skip_special_tokens=True)
