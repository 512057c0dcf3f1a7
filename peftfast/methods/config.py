"""The configuration of a method: a `peft.PeftConfig` that declares components."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig

from peftfast.methods.component import MODULES, Component
from peftfast.methods.registration import peft_type

_METHODS: dict[str, type[MethodConfig]] = {}
Declared = TypeVar("Declared", bound="type[MethodConfig]")


class _OfMethod(type):
    """PEFT makes a saved configuration from its type, which all methods share: the class is that
    of the method that it names. Fields that this version does not know are left out with a
    warning, as PEFT does for its own.
    """

    @property
    def __signature__(cls) -> inspect.Signature:
        """Of the constructor, which the call below would hide."""
        own = inspect.signature(vars(cls)["__init__"])
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if cls is not MethodConfig:
            return super().__call__(*args, **options)
        chosen = method_config(options.get("method"))
        known = {one.name for one in fields(chosen)}
        if unknown := sorted(set(options) - known):
            warnings.warn(
                f"{chosen.__name__} does not know {', '.join(unknown)}: ignored. The configuration"
                " was probably saved by another version of peft or peftfast",
                stacklevel=2,
            )
        return chosen(**{name: value for name, value in options.items() if name in known})


@dataclass
class MethodConfig(PeftConfig, metaclass=_OfMethod):
    """What every method's configuration has; a method is a subclass with `declare`.

    Args:
        method: the method's name, under which `register_method` has it; set by itself.
        layers: indices of the layers that are adapted, counted over the model's stacks in their
            order (encoder, then decoder); None: all.
        target_modules: names of modules, or ends of them, or a regular expression, or "all-linear"
            (every linear of the layers): what the site "modules" means.
        modules_to_save: further modules that are trained and saved, as in PEFT.
        train_norms: train every LayerNorm and RMSNorm of the model too, whatever `layers` says
            (copies of them, in modules_to_save, of which PEFT can use one adapter's at a time).
        finished: whether what only training needs, the networks that make prefixes and prompts, has
            been dropped (`peftfast.methods.finalize`).
        placed: where each component is, as [name of the module with # for numbers, places, width
            in, width out], by which a checkpoint is refused for a model that it doesn't fit; set
            when it is placed.
    """

    method: str | None = None
    layers: list[int] | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    train_norms: bool = False
    finished: bool = False
    placed: dict[str, list[list[Any]]] | None = field(default=None, repr=False)

    # The name that `register_method` gives a subclass.
    _method: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        own = type(self)._method
        if own is None:
            raise TypeError(
                f"{type(self).__name__} is no method by itself: use one of"
                f" {', '.join(sorted(one.__name__ for one in _METHODS.values()))}, or decorate a"
                ' class of your own with @peftfast.methods.register_method("name")'
            )
        if self.method not in (None, own):
            raise ValueError(f"method is {self.method!r}; {type(self).__name__} is {own!r}")
        self.method = own
        # Whether this is a saved configuration; one that is used twice is no checkpoint.
        self.is_saved = self.placed is not None
        self._norms: list[str] = []
        self.peft_type = peft_type()
        if self.layers is not None:
            self.layers = _indices(self.layers)
        if isinstance(self.modules_to_save, str):
            raise TypeError("modules_to_save is a string; a list of names is needed")
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        self.resolved()

    def save_norms(self, names: Sequence[str]) -> None:
        """Have PEFT train and save these, in place of those of a model before."""
        others = [one for one in self.modules_to_save or [] if one not in self._norms]
        self.modules_to_save = list(dict.fromkeys([*others, *names]))
        self._norms = list(names)

    def declare(self) -> list[Component]:
        """The declaration: the components, in the order in which they act. A method's subclass
        says it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no declare()")

    def resolved(self) -> list[Component]:
        """The components, checked against each other and against the configuration."""
        declared = self.declare()
        if not isinstance(declared, (list, tuple)):
            raise TypeError(
                f"{type(self).__name__}.declare() gives {type(declared).__name__}; a list of"
                " components is needed"
            )
        found = [Component.of(one) for one in declared]
        if self.finished or self.inference_mode:
            found = [one.finished() for one in found]
        if not found and not self.train_norms:
            raise ValueError(f"{type(self).__name__} declares no component, and trains no norms")
        names = [one.parameter_name for one in found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{names.count(name)} components are called {name!r}; give them names of their"
                    " own: Component(name=...)"
                )
        of_modules = any(one.site == MODULES for one in found)
        if of_modules and not self.target_modules:
            raise ValueError('a component is at the site "modules", and target_modules is not set')
        if self.target_modules and not of_modules:
            raise ValueError(
                f"target_modules is {self.target_modules!r}, which only components at the site"
                f' "modules" use; {type(self).__name__} finds its sites by the model\'s structure'
            )
        return found


def register_method(name: str) -> Callable[[Declared], Declared]:
    """Class decorator: make a dataclass that derives from `MethodConfig` a method of that name.

    The name is what a checkpoint's adapter_config.json says, so that PEFT makes the same class
    again where the module that declares it has been imported.

    Raises:
        ValueError: the name is another method's, or not an identifier in lower case.
    """

    if not isinstance(name, str):
        raise TypeError('register_method needs a name: @register_method("name")')

    def register(cls: Declared) -> Declared:
        if not name.isidentifier() or not name.islower():
            raise ValueError(f"name is {name!r}; an identifier in lower case is needed")
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(f"name is {name!r}, which is already {known.__name__}'s")
        cls._method = name
        _METHODS[name] = cls
        return cls

    return register


def method_config(name: str | None) -> type[MethodConfig]:
    """The class of the method of that name."""
    if name is None:
        raise ValueError(
            "method is missing: MethodConfig is the base of configurations; use one of a method,"
            f" such as HoulsbyConfig. Methods: {', '.join(sorted(_METHODS))}"
        )
    if name not in _METHODS:
        raise ValueError(
            f"method is {name!r}, which is not registered. Import the module that declares it"
            f" before loading. Methods: {', '.join(sorted(_METHODS))}"
        )
    return _METHODS[name]


def method_names() -> list[str]:
    """The methods that are registered."""
    return sorted(_METHODS)


def _indices(layers: Any) -> list[int]:
    if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
        raise TypeError(f"layers is {layers!r}; a list of indices is needed")
    found = list(layers)
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"layers has {one!r}; indices are needed")
        if one < 0:
            raise ValueError(f"layers has {one}; indices count from 0")
    if not found:
        raise ValueError("layers is empty; None means all")
    return found
