"""Learned input rows: prompts, with or without a network that makes them in training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ENCODERS = ("mlp", "lstm")
INITS = ("uniform", "normal", "embeddings")
_LAYERS = 2  # of the LSTM (Liu et al., section 3.2)


class PromptEmbedding(nn.Module):
    """P rows of a model's input width, for each of several tasks (Lester et al., "The Power of
    Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, section 2).

    With an encoder the rows are made of an embedding in each forward (Liu et al., "GPT Understands,
    Too", 2021, section 3.2; P-Tuning):

        "lstm": W2 relu(W1 BiLSTM(e) + b1) + b2, of two layers, over the prompt of each task
        "mlp": W3 relu(W2 relu(W1 e + b1) + b2) + b3, on each row (as in PEFT)

    Args:
        num_virtual_tokens: P.
        embedding_dim: d, the width of the model's input embeddings.
        encoder: None, "mlp" or "lstm".
        hidden: the encoder's width; None: d for "mlp", d / 2 in each direction for "lstm".
        tasks: how many prompts there are.
        init: of the rows, or of what the encoder reads: "uniform" on [-init_range, init_range]
            (Lester et al., section 3.1), "normal" with deviation init_std, or "embeddings": the
            caller sets them by `start`; zeros until then. The encoder's own as in torch's layers.
        init_range, init_std: as said.
        device, dtype: of the parameters.

    Parameters: weight [tasks P, d]; with an encoder embedding [tasks P, d] and, of "mlp",
    linear_i_weight, linear_i_bias for i < 3, or, of "lstm", lstm_* named as `torch.nn.LSTM` names
    them and linear_0 and linear_1. A state_dict has weight, the finished rows, with an encoder too,
    so that another without an encoder loads it; what has an encoder and is given weight alone
    drops the encoder.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    weight: nn.Parameter | None
    embedding: nn.Parameter | None

    def __init__(
        self,
        num_virtual_tokens: int,
        embedding_dim: int,
        *,
        encoder: str | None = None,
        hidden: int | None = None,
        tasks: int = 1,
        init: str = "uniform",
        init_range: float = 0.5,
        init_std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _one_of("encoder", encoder, (None, *ENCODERS))
        _one_of("init", init, INITS)
        _positive(num_virtual_tokens=num_virtual_tokens, embedding_dim=embedding_dim, tasks=tasks)
        if hidden is not None and encoder is None:
            raise ValueError(
                f"hidden is {hidden}, and encoder is None; only an encoder has a width"
            )
        if encoder is not None and init == "embeddings":
            raise ValueError(
                f"init is 'embeddings' and encoder is {encoder!r}, whose rows can't be chosen;"
                " say init='normal' or 'uniform'"
            )
        if hidden is None:
            hidden = max(1, embedding_dim // 2) if encoder == "lstm" else embedding_dim
        _positive(hidden=hidden)
        for name, value in (("init_range", init_range), ("init_std", init_std)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} is {type(value).__name__}; a number is needed")
            if not value >= 0.0:
                raise ValueError(f"{name} is {value}; it can't be negative")
        self.num_virtual_tokens, self.embedding_dim, self.tasks = (
            num_virtual_tokens,
            embedding_dim,
            tasks,
        )
        self.encoder, self.hidden = encoder, hidden
        self.init, self.init_range, self.init_std = init, float(init_range), float(init_std)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        size = (tasks * num_virtual_tokens, embedding_dim)
        for name in ("weight", "embedding"):
            present = (name == "weight") == (encoder is None)
            rows = nn.Parameter(torch.empty(size, **made)) if present else None
            self.register_parameter(name, rows)
        for name, shape in self._encoder_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)))
        self._awaits_rows = init == "embeddings"
        self.reset_parameters()

    def _encoder_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the encoder's own parameters, in order."""
        d, h = self.embedding_dim, self.hidden
        shapes: dict[str, tuple[int, ...]] = {}
        widths: list[int] = []
        if self.encoder == "lstm":
            for layer in range(_LAYERS):
                for end in ("", "_reverse"):
                    read = 2 * h if layer else d
                    shapes[f"lstm_weight_ih_l{layer}{end}"] = (4 * h, read)
                    shapes[f"lstm_weight_hh_l{layer}{end}"] = (4 * h, h)
                    shapes[f"lstm_bias_ih_l{layer}{end}"] = (4 * h,)
                    shapes[f"lstm_bias_hh_l{layer}{end}"] = (4 * h,)
            widths = [2 * h, 2 * h, d]
        elif self.encoder == "mlp":
            widths = [d, h, h, d]
        for index, (read, written) in enumerate(zip(widths, widths[1:], strict=False)):
            shapes[f"linear_{index}_weight"] = (written, read)
            shapes[f"linear_{index}_bias"] = (written,)
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter as `init` says."""
        rows = self.weight if self.embedding is None else self.embedding
        assert rows is not None
        if self.init == "uniform":
            nn.init.uniform_(rows, -self.init_range, self.init_range)
        elif self.init == "normal":
            nn.init.normal_(rows, std=self.init_std)
        else:
            nn.init.zeros_(rows)
        for name, shape in self._encoder_shapes().items():
            if name.startswith("lstm_"):
                bound = self.hidden**-0.5
            else:
                weight = self.get_parameter(name.replace("_bias", "_weight"))
                bound = math.sqrt(1 / weight.shape[1])
            nn.init.uniform_(self.get_parameter(name).view(shape), -bound, bound)

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder makes the rows."""
        return self.embedding is not None

    @property
    def owns_encoder(self) -> bool:
        """Whether it has an encoder, which it shares with no other."""
        return self.has_encoder

    @property
    def awaits_rows(self) -> bool:
        """Whether `start` has still to set what init is "embeddings" for."""
        return self._awaits_rows

    def rows(self) -> Tensor:
        """The prompts of all tasks, one after another [tasks P, d]."""
        if self.weight is not None:
            return self.weight
        assert self.embedding is not None
        held: dict[str, Tensor] = {
            name: self.get_parameter(name) for name in self._encoder_shapes()
        }
        value: Tensor = self.embedding
        count = len(held)
        if self.encoder == "lstm":
            lstm = [one for name, one in held.items() if name.startswith("lstm_")]
            value = self._lstm(value, lstm)
            count -= len(lstm)
        for index in range(count // 2):
            if index:
                value = F.relu(value)
            value = F.linear(value, held[f"linear_{index}_weight"], held[f"linear_{index}_bias"])
        return value

    def _lstm(self, value: Tensor, weights: list[Tensor]) -> Tensor:
        """torch.nn.LSTM's forward, over the prompt of each task: [tasks P, 2 h]."""
        value = value.view(self.tasks, self.num_virtual_tokens, self.embedding_dim)
        start = value.new_zeros(2 * _LAYERS, self.tasks, self.hidden)
        out: Tensor = torch.lstm(
            value, (start, start), weights, True, _LAYERS, 0.0, self.training, True, True
        )[0]
        return out.reshape(-1, 2 * self.hidden)

    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """The prompt, or the prompts of tasks.

        Args:
            task_ids: [B], integers from 0, below `tasks`; None: there is one.

        Returns:
            [P, d]; with task_ids [B, P, d].

        Raises:
            ValueError: there are several tasks and task_ids is None, or it has not one dimension.
            IndexError: a task is not there (on a device its own error).
        """
        rows = self.rows()
        if task_ids is None:
            if self.tasks > 1:
                raise ValueError(f"task_ids is None; of {self.tasks} tasks one must be chosen")
            return rows
        if task_ids.dim() != 1:
            raise ValueError(f"task_ids has the shape {tuple(task_ids.shape)}; [B] is needed")
        # Negative ones would be counted from the end.
        task_ids = task_ids.masked_fill(task_ids < 0, self.tasks)
        chosen: Tensor = rows.view(self.tasks, self.num_virtual_tokens, -1)[task_ids]
        return chosen

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Set the rows [tasks P, d], or one prompt [P, d] for every task, by their values.

        Raises:
            ValueError: there is an encoder, or the shape is another.
        """
        if self.weight is None:
            raise ValueError(
                f"the rows come from an encoder ({self.encoder}); finalize() before setting them"
            )
        if tuple(rows.shape) == (self.num_virtual_tokens, self.embedding_dim):
            rows = rows.repeat(self.tasks, 1)
        if rows.shape != self.weight.shape:
            raise ValueError(
                f"rows has the shape {tuple(rows.shape)}; {tuple(self.weight.shape)} is needed"
            )
        self.weight.copy_(rows)
        self._awaits_rows = False

    @torch.no_grad()
    def finalize(self) -> None:
        """Drop the encoder and keep its rows as weight; without one nothing happens."""
        if self.embedding is None:
            return
        self._drop_encoder(self.rows().detach().clone())

    def _drop_encoder(self, rows: Tensor) -> None:
        assert self.embedding is not None
        trained = self.embedding.requires_grad
        self.weight = nn.Parameter(rows, requires_grad=trained)
        for name in self._encoder_shapes():
            delattr(self, name)
        self.embedding = None
        self.encoder = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight is None:
            with torch.no_grad():
                destination[f"{prefix}weight"] = self.rows().detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        given = dict(state_dict)
        has_rows, has_encoder = f"{prefix}weight" in given, f"{prefix}embedding" in given
        if self.embedding is not None and has_rows and not has_encoder:
            name, rows = f"{prefix}weight", given[f"{prefix}weight"]
            if rows.shape != self.embedding.shape:
                errors: list[str] = rest[4] if len(rest) > 4 else more["error_msgs"]
                errors.append(
                    f"size mismatch for {name}: {tuple(rows.shape)} in the checkpoint,"
                    f" {tuple(self.embedding.shape)} here; the encoder is kept"
                )
                return
            self._drop_encoder(torch.empty_like(self.embedding))
        # Of the two forms only that which this module has.
        others = ["weight"]
        if self.embedding is None and has_rows:
            others = ["embedding"]
            others += [
                name.removeprefix(prefix)
                for name in given
                if name.startswith((f"{prefix}lstm_", f"{prefix}linear_"))
            ]
        for name in others:
            if self._parameters.get(name) is None:
                given.pop(f"{prefix}{name}", None)
        super()._load_from_state_dict(given, prefix, *rest, **more)

    def extra_repr(self) -> str:
        words = f"num_virtual_tokens={self.num_virtual_tokens}, embedding_dim={self.embedding_dim}"
        if self.encoder is not None:
            words += f", encoder={self.encoder!r}, hidden={self.hidden}"
        return words if self.tasks == 1 else f"{words}, tasks={self.tasks}"


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {type(value).__name__}; an integer is needed")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
