"""Logs of programs, as columns: templates, parameters and fields.

- `ParsedLog`: messages by their `Template`s; `log_of_templates` makes one of messages
  whose templates are known, `message_parameters` are those of one message, and
  `message_texts` the messages again.
- `grouping_metrics`: how well a parser groups messages (`LogParsingMetrics`).
"""

from ._metrics import (
    LogParsingMetrics as LogParsingMetrics,
    grouping_metrics as grouping_metrics,
)
from ._record import (
    ParsedLog as ParsedLog,
    Template as Template,
    log_of_templates as log_of_templates,
    message_parameters as message_parameters,
    message_texts as message_texts,
)

__all__ = [
    "LogParsingMetrics",
    "ParsedLog",
    "Template",
    "grouping_metrics",
    "log_of_templates",
    "message_parameters",
    "message_texts",
]
