"""Logs of programs, as columns: templates, parameters and fields.

- `ParsedLog`: messages by their `Template`s; `log_of_templates` makes one of messages
  whose templates are known, `message_parameters` are those of one message, and
  `message_texts` the messages again.
- `grouping_metrics`: how well a parser groups messages (`LogParsingMetrics`).
- `parse_logql`, `LogqlQuery`, `LogqlStage`: queries of logs;
  `execute_logql` is what they find, `logql_execution_match` whether two find the same,
  and `logql_grammar`, `LogqlGrammar` are for models that write them.
- `message_tokens`, `token_features`, `variable_aware_template`: for taggers that know
  the kinds of variables, of which some stay in templates.
"""

from ._logql import (
    LogqlQuery as LogqlQuery,
    LogqlStage as LogqlStage,
    execute_logql as execute_logql,
    logql_execution_match as logql_execution_match,
    parse_logql as parse_logql,
)
from ._logql_grammar import (
    LogqlGrammar as LogqlGrammar,
    logql_grammar as logql_grammar,
)
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
from ._variables import (
    message_tokens as message_tokens,
    token_features as token_features,
    variable_aware_template as variable_aware_template,
)

__all__ = [
    "LogParsingMetrics",
    "LogqlGrammar",
    "LogqlQuery",
    "LogqlStage",
    "ParsedLog",
    "Template",
    "execute_logql",
    "grouping_metrics",
    "log_of_templates",
    "logql_execution_match",
    "logql_grammar",
    "message_parameters",
    "message_texts",
    "message_tokens",
    "parse_logql",
    "token_features",
    "variable_aware_template",
]
