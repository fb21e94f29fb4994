"""Queries of LogQL: what is read, what is found, and what a grammar lets be written."""

import itertools

import jax
import numpy as np
import pytest

from softlib import decoding, logs
from tests.host import jnp

LINES = [
    "accepted key for ann port=22 took=0.5",
    "no route to host",
    '{"took": 3, "user": "bob", "deep": {"a": 1}}',
    'accepted key for "bob" port=2222 took=4',
    "no route to host",
]
LABELS = {
    "unit": ["ssh", "net", "web", "ssh", "net"],
    "level": ["info", "error", "info", "info", "warning"],
}
TIMES = [0.0, 60.0, 90.0, 100.0, 300.0]
LOG = (LINES, LABELS, TIMES)


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ('{unit="ssh"}', [0, 3]),
        ('{unit!="ssh"}', [1, 2, 4]),
        ('{unit=~"s.h|web", level="info"}', [0, 2, 3]),
        ('{unit!~"s.*"}', [1, 2, 4]),
        ('{unit=~"s"}', []),  # all of a label
        ('{missing=""}', [0, 1, 2, 3, 4]),
        ('{level="info"} |= "key"', [0, 3]),
        ('{level="info"} |= "key" != "ann"', [3]),
        ('{level="info"} |= `"bob"`', [2, 3]),
        ('{level="info"} |= "\\"bob\\""', [2, 3]),
        ('{level="info"} |~ "port=2+ "', [0, 3]),
        ('{level="info"} !~ "port=2+ "', [2]),
        ('{level="info"} | logfmt | took > 0.5', [3]),
        ('{level="info"} | logfmt | took >= 0.5', [0, 3]),
        ('{level="info"} | logfmt | port == 22', [0]),
        ('{level="info"} | json | took < 4', [2]),
        ('{level="info"} | json | user="bob"', [2]),
        ('{level="info"} | json | user!="bob"', [0, 3]),
        ('{level="info"} | json | deep > 0', []),
        ('{level=~".*"} | level="error"', [1]),
    ],
)
def test_queries_find_lines(query, rows):
    np.testing.assert_array_equal(logs.execute_logql(query, *LOG), rows)


def test_metrics_count_lines():
    execute = logs.execute_logql
    by_level = 'sum by (level) (count_over_time({unit!="web"} [5m]))'
    assert execute(by_level, *LOG) == {
        (("level", "error"),): 1.0,
        (("level", "info"),): 1.0,  # that at the very start of the range is out
        (("level", "warning"),): 1.0,
    }
    apart = execute('rate({unit="ssh"} [100s])', *LOG, at=99.0)
    assert apart == {(("level", "info"), ("unit", "ssh")): 0.01}
    assert execute('sum(count_over_time({unit=~".+"} [1h]))', *LOG) == {(): 5.0}
    assert execute('sum(count_over_time({unit="x"} [1h]))', *LOG) == {}
    assert execute('rate({unit="ssh"} [1h])', [], {"unit": []}, []) == {}


def test_spellings_are_one_query():
    spelled = ['sum by(b,a)(rate( {x="1",y!="2"}|="t"[60s] ))']
    spelled += ['sum by (a, b) (rate({y!="2", x="1"} |= `t` [1m]))']
    one, two = map(logs.parse_logql, spelled)
    assert one == two
    assert str(one) == 'sum by (a, b) (rate({x="1", y!="2"} |= "t" [1m]))'
    for query in (str(one), '{a="\\n\\"\\\\"} | json | x != 2 | y = "z" |~ "a.b"'):
        assert str(logs.parse_logql(str(logs.parse_logql(query)))) == str(
            logs.parse_logql(query)
        )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "'{' at character 0, got the end"),
        ("{}", "a name at character 1, got '}'"),
        ('{a="b"', "'}' at character 6, got the end"),
        ('{a="b"} |= x', "a text at character 10"),
        ('{a=~"("}', "a regular expression before it"),
        ('{a="b"} | c > "d"', "a number at character"),
        ('rate({a="b"})', r"'\[' at character"),
        ('rate({a="b"} [5x])', "'ms' or 's' or 'm'"),
        ('rate({a="b"} [0s])', "a range above 0"),
        ('avg({a="b"} [5m])', "'rate' or 'count_over_time' or 'sum' at character 0"),
        ('sum(sum(rate({a="b"} [5m])))', "one sum only"),
        ('{a="b"} ? ', r"the end at character 7, got '\?'"),
        ('{a="b"} }', "the end at character 7"),
    ],
)
def test_errors_say_what_was_expected(query, message):
    wanted = f"^parse_logql: `query` must have {message}"
    with pytest.raises(ValueError, match=wanted):
        logs.parse_logql(query)


def test_execution_match():
    match = logs.logql_execution_match
    assert match('{level="info", unit="ssh"}', '{unit="ssh"}', *LOG)
    assert not match('{unit="ssh"', '{unit="ssh"}', *LOG)
    assert not match('{unit="net"}', '{unit="ssh"}', *LOG)
    count = 'sum(count_over_time({unit="ssh"} [5m]))'
    assert match(count, 'sum(count_over_time({unit="ssh"} |= "key" [5m]))', *LOG)
    assert not match('sum(rate({unit="ssh"} [5m]))', count, *LOG)
    assert not match('{unit="ssh"}', count, *LOG)
    assert not match(count, '{unit="ssh"}', *LOG)
    with pytest.raises(ValueError, match=r"^logql_execution_match: `query` must"):
        match(count, "{", *LOG)


def test_columns_have_one_length():
    with pytest.raises(ValueError, match=r"^execute_logql: `unit` must have one entry"):
        logs.execute_logql('{unit="a"}', ["x"], {"unit": []}, [0.0])


# ------------------------------------------------------------------------------ grammar
def grammar():
    return logs.logql_grammar(
        {"unit": ["ssh", 'a"b'], "level": ["error"]},
        ["no route", "\\"],
        fields=["took"],
        numbers=[0.5, 3],
    )


def test_all_that_a_random_model_writes_are_queries():
    """1000 draws from random logits, and a second parser that reads them."""
    made = grammar()
    size = 1000, len(made.tokens)

    def step(tokens, key):
        key, own = jax.random.split(key)
        return 3 * jax.random.normal(own, size), key

    @jax.jit
    def draw(transitions):
        return decoding.generate(
            step,
            jax.random.key(0),
            jnp.zeros(size),
            key=jax.random.key(1),
            max_length=64,
            stop=(made.end,),
            processors=(decoding.TokenAutomaton(transitions),),
        )

    drawn = draw(made.transitions)
    ended = np.asarray(drawn.tokens == made.end).any(1)
    assert ended.mean() > 0.95  # a query may have any length
    queries, kinds = set(), set()
    for ids in np.asarray(drawn.tokens)[ended]:
        query = logs.parse_logql(made.text(ids))
        queries.add(str(query))
        kinds.add((query.function, query.by))
        logs.execute_logql(query, *LOG)
    assert len(queries) > 300
    assert len(kinds) == 7


def test_every_state_is_reached_and_has_an_end():
    table = grammar().transitions
    moves = [set(row[row >= 0].tolist()) for row in table]
    reached = {0}
    for _ in table:
        reached |= set(itertools.chain(*(moves[state] for state in reached)))
    assert reached == set(range(len(table)))
    assert all(moves)
    assert len(table) < 40


def test_a_grammar_needs_labels():
    with pytest.raises(ValueError, match=r"^logql_grammar: `labels` must hold"):
        logs.logql_grammar({"unit": []}, [])
    with pytest.raises(ValueError, match=r"^logql_grammar: `numbers` must hold one"):
        logs.logql_grammar({"unit": ["a"]}, [], fields=["took"])
