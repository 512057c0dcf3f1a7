"""The inputs of a model with prompts in them: where the rows and a template's tokens go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VIRTUAL = "[P]"
SLOT = "{x}"
MASK = "mask"
POSITIONS = ("start", "after_first", "end")
IGNORED = -100
_NO_ID = -1  # which every embedding refuses
# Of a forward whose rows are several sequences each.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Of a forward, beside the model's own. PEFT's models of a task_type keep task_ids for themselves.
TASKS = ("task_ids", "prompt_tasks")


@dataclass(frozen=True)
class Prompt:
    """One prompt as it acts: what stands before and after the slot, as ids (of virtual tokens:
    places in the prompt), and how many real tokens stay outside at either end.
    """

    module: Any
    head: tuple[Any, ...]
    tail: tuple[Any, ...]
    leading: int
    trailing: int
    first: int  # the id of its first row

    @property
    def added(self) -> int:
        return len(self.head) + len(self.tail)

    @property
    def masks(self) -> int:
        return sum(isinstance(one, dict) for one in (*self.head, *self.tail))


class Layout:
    """One prompt in rows of real tokens: head before the real column `begin`, tail before `end`.

    Padding at either end and holes keep their places; rows of padding alone take the prompt at
    their beginning.
    """

    def __init__(
        self,
        prompt: Prompt,
        mask: Tensor | None,
        rows: int,
        columns: int,
        device: torch.device,
        tasks: Tensor | None,
    ) -> None:
        self.prompt, self.columns = prompt, columns
        before, after = len(prompt.head), len(prompt.tail)
        if mask is None:
            start = torch.zeros(1, 1, dtype=torch.long, device=device)
            stop = start + columns
        else:
            real = mask != 0
            none = ~real.any(1, keepdim=True)
            start = real.int().argmax(1, keepdim=True)
            stop = columns - real.flip(1).int().argmax(1, keepdim=True)
            stop = torch.where(none, start, stop)
        begin = torch.minimum(start + prompt.leading, stop)
        end = torch.maximum(stop - prompt.trailing, begin)
        place = torch.arange(columns + before + after, device=device).unsqueeze(0)
        self.in_head = (place >= begin) & (place < begin + before)  # [B or 1, L]
        self.in_tail = (place >= end + before) & (place < end + before + after)
        self.is_added = (self.in_head | self.in_tail).expand(rows, -1)
        source = place - before * (place >= begin + before)
        source = source - after * (place >= end + before + after)
        # An added place takes what belongs to the real token before it, or else after it.
        near = torch.where(self.in_head, begin - 1, end - 1)
        near = torch.maximum(near, torch.minimum(start, stop - 1))
        self.source = torch.where(self.in_head | self.in_tail, near, source)
        self.source = self.source.clamp(0, columns - 1).expand(rows, -1)
        # Places in head, tail: [B or 1, L], of no meaning elsewhere.
        item = torch.where(self.in_head, place - begin, place - end - before + before)
        self.item = item.clamp(0, before + after - 1).expand(rows, -1)
        self.ahead = torch.where(self.in_head, place - begin + 1, place - end + 1)
        self.starts_row = (self.in_head & (begin == start)) | (self.in_tail & (end == start))
        self.moved = before * (place >= begin + before) + after * (place >= end + before + after)
        self.begin, self.end, self.before, self.after = begin, end, before, after
        self.tasks = tasks

    def put(self, value: Tensor, fill: Any) -> Tensor:
        """value [..., S] with `fill` at the added places: [..., L]."""
        return self.near(value).masked_fill(self.is_added, fill)

    def near(self, value: Tensor) -> Tensor:
        """value [..., S] with a neighbour's at the added places: [..., L]."""
        source = self.source
        if value.shape[-2] == 1 and source.shape[0] > 1:
            value = value.expand(*value.shape[:-2], source.shape[0], value.shape[-1])
        return value.gather(-1, source.expand(*value.shape[:-1], source.shape[-1]))

    def put_mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else self.put(mask, 1)

    def put_positions(self, positions: Tensor) -> Tensor:
        """Positions that go on through the added places; those after it move."""
        near = self.near(positions)
        added = near + torch.where(self.starts_row, self.ahead - 1, self.ahead)
        return torch.where(self.is_added, added, near + self.moved)

    def where(self, columns: Tensor) -> Tensor:
        """The new places of columns [B]; those beyond the row stay beyond it."""
        columns = columns.unsqueeze(1)
        moved = columns + self.before * (columns >= self.begin) + self.after * (columns >= self.end)
        inside = (columns >= 0) & (columns < self.columns)
        beyond = columns + (self.before + self.after) * (columns > 0)
        return torch.where(inside, moved, beyond).squeeze(1)

    def of_all(self, columns: Tensor, name: str) -> Tensor:
        """The new places of columns [K] of every row; raises where rows differ in them."""
        columns = (columns + self.columns * (columns < 0)).unsqueeze(0)
        moved = columns + self.before * (columns >= self.begin) + self.after * (columns >= self.end)
        if not bool((moved == moved[:1]).all()):
            raise ValueError(
                f"{name} has columns whose places differ between the rows, which are padded: leave"
                " it out, and take the logits by `peftfast.methods.embedded`"
            )
        return moved[0]

    def _of_entries(self, values: Sequence[int]) -> Tensor:
        """One number for each entry of head and tail, at their places: [B, L]."""
        return torch.tensor(values, device=self.item.device)[self.item]

    @property
    def _entries(self) -> tuple[Any, ...]:
        return (*self.prompt.head, *self.prompt.tail)

    @property
    def is_mask(self) -> Tensor:
        chosen = self._of_entries([isinstance(one, dict) for one in self._entries])
        return chosen & self.is_added

    @property
    def is_virtual(self) -> Tensor:
        chosen = self._of_entries([isinstance(one, tuple) for one in self._entries])
        return chosen & self.is_added

    def ids(self) -> Tensor:
        """The ids at the added places [B, L]."""
        first = self.prompt.first
        values = [
            first + one[1] if isinstance(one, tuple) else token_of(one) for one in self._entries
        ]
        ids = self._of_entries(values)
        if self.tasks is None:
            return ids
        tasks = self.tasks.to(ids).unsqueeze(1)
        rows = ids + tasks * self.prompt.module.num_virtual_tokens
        rows = rows.masked_fill((tasks < 0) | (tasks >= self.prompt.module.tasks), _NO_ID)
        return torch.where(self.is_virtual, rows, ids)


def token_of(entry: Any) -> int:
    """The id of a template's token."""
    return int(entry[MASK]) if isinstance(entry, dict) else int(entry)


def lengthened(
    model: Any,
    embed: Callable[[Tensor], Tensor],
    prompts: Sequence[Prompt],
    inputs: dict[str, Any],
    tasks: tuple[str, Tensor] | None,
    real: int | None = None,
    inserted: bool = False,
) -> dict[str, Any]:
    """The inputs of a model's forward with prompts in them, one after another.

    Args:
        embed: the model's embedding of ids, those of virtual tokens among them.
        tasks: of the rows [B], with the argument's name, or None.
        real: how many columns were there when the prompts were put in; later ones come after all.
        inserted: whether the ids are after prompts that are in the cache.
    """
    inputs = {name: value for name, value in inputs.items() if name not in TASKS}
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    first = ids if ids is not None else embeds
    mask = inputs.get("attention_mask")
    if ids is not None and prompts:
        # An id beyond the vocabulary must not be read as a prompt's.
        inputs["input_ids"] = ids.masked_fill(ids >= prompts[0].first, _NO_ID)
    if prompts and not inserted:
        _refuse_packed(inputs)
    for prompt in prompts:
        if ids is not None and ids.dim() != 2:
            raise ValueError(
                f"input_ids has the shape {tuple(ids.shape)}; prompts are put into [B, S]"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask has the shape {shape}; prompts are put into one of [B, S], or None"
            )
        if inserted:
            inputs = _later(prompt, inputs, real)
        else:
            chosen = _tasks_of(prompt, tasks, first)
            inputs = _first(model, embed, prompt, inputs, chosen, real)
        real = None if real is None else real + prompt.added
        mask = inputs.get("attention_mask")
        first = inputs.get("input_ids")
        first = inputs.get("inputs_embeds") if first is None else first
    return inputs


def mask_of_outputs(prompts: Sequence[Prompt], inputs: dict[str, Any]) -> Tensor | None:
    """The attention_mask of a forward that is given encoder_outputs: as long as these are, where
    they were made with the prompts and the mask is that of the input without.
    """
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return mask
    added = inputs["encoder_outputs"][0].shape[1] - mask.shape[1]
    if added and added == sum(one.added for one in prompts):
        for prompt in prompts:
            layout = Layout(prompt, mask, mask.shape[0], mask.shape[1], mask.device, None)
            mask = layout.put(mask, 1)
    return mask


def _refuse_packed(inputs: dict[str, Any]) -> None:
    """Raise where a row is several sequences, of which each would need a prompt."""
    packed = [name for name in _PACKED if inputs.get(name) is not None]
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not packed and isinstance(positions, Tensor) and positions.dim() == 2:
        again = positions[:, 1:] <= positions[:, :-1]
        if mask is not None and mask.shape[1] == positions.shape[1]:
            again = again & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        if not torch.compiler.is_compiling() and bool(again.any()):
            packed = ["position_ids, which start again within a row"]
    if packed:
        raise ValueError(
            f"the rows are packed ({', '.join(packed)}): a prompt is put into a row once, not into"
            " each of its sequences. Give one sequence a row, with padding"
        )


def _first(
    model: Any,
    embed: Callable[[Tensor], Tensor],
    prompt: Prompt,
    inputs: dict[str, Any],
    tasks: Tensor | None,
    real: int | None,
) -> dict[str, Any]:
    """One prompt in inputs that hold the beginning."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    first: Any = ids if ids is not None else embeds
    rows, columns = first.shape[:2]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] != columns:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; the input has {columns}, and no cache"
            " holds others"
        )
    if real is not None and real < columns:
        # What was generated comes after the prompt: it counts as no part of the rows.
        own = torch.zeros(rows, columns, dtype=torch.bool, device=first.device)
        own[:, :real] = True if mask is None else mask[:, :real] != 0
        layout = Layout(prompt, own, rows, columns, first.device, tasks)
    else:
        layout = Layout(prompt, mask, rows, columns, first.device, tasks)
    found = dict(inputs)
    if ids is not None:
        found["input_ids"] = torch.where(layout.is_added, layout.ids().to(ids), layout.near(ids))
    if embeds is not None:
        added = embed(layout.ids().masked_fill(~layout.is_added, 0))
        source = layout.source.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])
        kept = embeds.gather(1, source)
        chosen = layout.is_added.unsqueeze(-1)
        found["inputs_embeds"] = torch.where(chosen, added.to(embeds.dtype), kept)
    if mask is not None:
        found["attention_mask"] = layout.put_mask(mask)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:
            found[name] = layout.near(inputs[name])
    if inputs.get("position_ids") is not None:
        found["position_ids"] = layout.put_positions(inputs["position_ids"])
    if not model.config.is_encoder_decoder:
        if inputs.get("labels") is not None:
            found["labels"] = _labels(model, layout, inputs["labels"], (rows, columns))
        if inputs.get("shift_labels") is not None:
            # What a place predicts belongs to the token after it, which moves.
            ahead = inputs["shift_labels"]
            labels = torch.cat([ahead.new_full((rows, 1), IGNORED), ahead[:, :-1]], 1)
            labels = layout.put(labels, IGNORED)
            found["shift_labels"] = torch.cat([labels[:, 1:], ahead[:, -1:]], 1)
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            found["logits_to_keep"] = layout.of_all(inputs["logits_to_keep"], "logits_to_keep")
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                found[name] = layout.where(inputs[name])
    return found


def _later(prompt: Prompt, inputs: dict[str, Any], real: int | None) -> dict[str, Any]:
    """Inputs that come after a prompt in the cache: masks and positions alone are longer."""
    found = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None:
        begun = mask.shape[1] if real is None else min(real, mask.shape[1])
        layout = Layout(prompt, mask[:, :begun], mask.shape[0], begun, mask.device, None)
        found["attention_mask"] = torch.cat([layout.put(mask[:, :begun], 1), mask[:, begun:]], 1)
    if inputs.get("position_ids") is not None:
        found["position_ids"] = inputs["position_ids"] + prompt.added
    return found


def _labels(model: Any, layout: Layout, labels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Labels of tokens at their tokens' places; those of a template's M [MASK]s there, which
    labels [B, M] are, however many columns there are.
    """
    masks = layout.prompt.masks if model.get_output_embeddings() is not None else 0
    of_masks = masks > 0 and tuple(labels.shape) == (shape[0], masks)
    if tuple(labels.shape) == shape and not labels.is_floating_point() and not of_masks:
        return layout.put(labels, IGNORED)
    if not masks:
        return labels  # of the whole sequence
    given = labels.unsqueeze(1) if labels.dim() == 1 else labels
    if tuple(given.shape) != (shape[0], masks):
        raise ValueError(
            f"labels has the shape {tuple(labels.shape)}; {shape} is needed, or ({shape[0]},"
            f" {masks}) for the template's {masks} [MASK]"
        )
    chosen = layout.is_mask
    order = (chosen.long().cumsum(1) - 1).clamp(min=0)
    return given.gather(1, order).masked_fill(~chosen, IGNORED)


def take_tasks(inputs: dict[str, Any]) -> tuple[str, Tensor] | None:
    """Take the tasks out of a forward's arguments, with the name of the argument."""
    given = [(name, inputs.pop(name, None)) for name in TASKS]
    name, tasks = next((one for one in given if one[1] is not None), ("", None))
    if tasks is None:
        return None
    if not isinstance(tasks, Tensor):
        raise TypeError(f"{name} is {type(tasks).__name__}; a tensor of integers [B] is needed")
    return name, tasks


def _tasks_of(prompt: Prompt, given: tuple[str, Tensor] | None, first: Any) -> Tensor | None:
    """The tasks [B] for a prompt; None: it has one."""
    count = prompt.module.tasks
    if count == 1:
        return None
    if given is None:
        raise ValueError(
            f"task_ids is missing: the prompt has {count} tasks, and each row needs one. PEFT's"
            " models of a task_type don't pass task_ids on in forward: call it prompt_tasks"
        )
    name, tasks = given
    rows = first.shape[0]
    if tasks.shape != (rows,) or tasks.is_floating_point() or tasks.dtype == torch.bool:
        raise ValueError(
            f"{name} has the shape {tuple(tasks.shape)} and dtype {tasks.dtype}; integers"
            f" [{rows}] are needed"
        )
    checked = tasks.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked and not bool(((tasks >= 0) & (tasks < count)).all()):
        raise ValueError(f"{name} has {tasks.tolist()}; the prompt has tasks 0 to {count - 1}")
    return tasks
