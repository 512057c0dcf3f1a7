"""What importing `peftfast.methods` adds to PEFT: one type, its configuration and its tuner.

PEFT keeps its types in an enum, to which nothing can be added in an official way; here is the one
place that does it.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

TYPE = "PEFTFAST"
PREFIX = "peftfast_"


def peft_type() -> Any:
    """The member of `peft.PeftType` that all methods of peftfast share."""
    if TYPE not in PeftType.__members__:
        member: Any = str.__new__(PeftType, TYPE)
        member._name_ = member._value_ = TYPE
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(TYPE)
        PeftType._member_map_[TYPE] = member
        PeftType._value2member_map_[TYPE] = member
        # Attribute access: members are attributes of the class from Python 3.11 on.
        type.__setattr__(PeftType, TYPE, member)
    return PeftType(TYPE)


def register(config_cls: type, tuner_cls: type) -> None:
    """Make the type known to PEFT; nothing happens where it already is."""
    kind = peft_type()
    if kind in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    register_peft_method(
        name=TYPE.lower(), config_cls=config_cls, model_cls=tuner_cls, prefix=PREFIX
    )


def registrations() -> list[str]:
    """What is registered with PEFT, in words."""
    if TYPE not in PeftType.__members__ or peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return []
    return [f"peft.PeftType.{TYPE}, its configuration, tuner and prefix {PREFIX!r}"]
