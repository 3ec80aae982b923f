"""How weights move: update rules, a file each, and the optimizer that shares them out over ranks.

To add one, write its file beside adam.py, with a subclass of Rule, and name it in a template's
update_rules().
"""

from .adam import Adam, adam_update
from .adamw import AdamW, adamw_rules, adamw_update
from .config import OptimConfig
from .gradients import gradient_report
from .lora import LoRA, rules_of
from .muon import Muon, muon_update
from .optimizer import Optimizer
from .rows import RowAdam, row_update
from .rule import Rule
from .touched import TouchedRows

__all__ = [
    "Adam",
    "AdamW",
    "LoRA",
    "Muon",
    "OptimConfig",
    "Optimizer",
    "RowAdam",
    "Rule",
    "TouchedRows",
    "adam_update",
    "adamw_rules",
    "adamw_update",
    "gradient_report",
    "muon_update",
    "row_update",
    "rules_of",
]
