"""The ranker that is a Python function: found, isolated, limited in time, its scores checked, its process ended."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from selm_fast.errors import Refused, RunFailed
from selm_fast.iteration import scorer_worker
from selm_fast.iteration.scorer import PythonScorer, check_function, score_distinct

REPOSITORY = Path(__file__).resolve().parents[2]
MINUTE = 60.0
Write = Callable[..., str]


def write_module(folder: Path, name: str, source: str) -> str:
    (folder / f"{name}.py").write_text(dedent(source))
    return f"python:{name}:score"


@pytest.fixture
def ranker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module `ranker` in the current folder; -> the name of its function `score`."""
    monkeypatch.chdir(tmp_path)

    def write(source: str, name: str = "ranker") -> str:
        return write_module(tmp_path, name, source)

    return write


def score_one(spec: str, *, timeout_s: float = MINUTE, prompt: str = "p", texts: Sequence[str] = ("a",)) -> np.ndarray:
    with PythonScorer(spec, timeout_s=timeout_s) as scorer:
        return scorer.score([prompt], [texts])


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., np.ndarray]]:
    """One process for many tests: a ranker that returns what its first prompt says, for 2 prompts of 3 candidates."""
    folder = tmp_path_factory.mktemp("evaluator")
    source = """
        import math
        import numpy as np

        class Tensor:
            def __init__(self, *values):
                self.values = values
            def tolist(self):
                return [value.tolist() if isinstance(value, Tensor) else value for value in self.values]

        class Scalar:
            def __init__(self, value):
                self.value = value
            def tolist(self):
                return self.value

        def score(prompts, candidates):
            return eval(prompts[0])
    """
    spec = write_module(folder, "evaluator", source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        with PythonScorer(spec, timeout_s=MINUTE) as scorer:

            def evaluate(expression: str) -> np.ndarray:
                return scorer.score([expression, "the second prompt"], [["a", "b", "c"], ["d", "e", "f"]])

            yield evaluate


EXPECTED = [[1.0, 2.0, 3.0], [4.5, 5.0, -6.0]]


@pytest.mark.parametrize(
    "expression",
    [
        "[[1, 2, 3], [4.5, 5, -6]]",
        "((1, 2, 3), (4.5, 5, -6))",
        "np.array([[1, 2, 3], [4.5, 5, -6]])",
        "np.array([[1, 2, 3], [4.5, 5, -6]], dtype=np.float16)",
        "[np.array([1, 2, 3]), np.array([4.5, 5, -6])]",
        "[[np.int64(1), 2, np.float32(3)], [np.float64(4.5), 5, -6]]",
        "Tensor(Tensor(1, 2, 3), Tensor(4.5, 5, -6))",
        "[[Scalar(1), Scalar(2), Scalar(3)], Tensor(4.5, 5, -6)]",
    ],
)
def test_lists_arrays_and_tensors_are_scores(evaluator: Callable[[str], np.ndarray], expression: str) -> None:
    scores = evaluator(expression)
    assert scores.dtype == np.float64
    assert scores.tolist() == EXPECTED


def test_scores_come_back_to_the_bit(evaluator: Callable[[str], np.ndarray]) -> None:
    values = [0.1 + 0.2, 5e-324, -0.0, 1.7976931348623157e308, -1 / 3, 1e-300]
    scores = evaluator(repr([values[:3], values[3:]]))
    assert scores.tobytes() == np.array(values).tobytes()


def test_nan_is_let_through(evaluator: Callable[[str], np.ndarray]) -> None:
    scores = evaluator("[[1, math.nan, 3], [4, 5, np.float32('nan')]]")
    np.testing.assert_array_equal(scores, [[1, math.nan, 3], [4, 5, math.nan]])


@pytest.mark.parametrize(
    ("expression", "message", "prompt"),
    [
        ("None", "it is None; expected a list of 2", None),
        ("'abc'", "it is 'abc'; expected a list of 2", None),
        ("3.5", "it is 3.5; expected a list of 2", None),
        ("{0: [1, 2, 3]}", "it is a dict; expected a list of 2", None),
        ("(row for row in [[1, 2, 3]] * 2)", "it is a generator; expected a list of 2", None),
        ("[[1, 2, 3]]", "it is a list of 1; expected 2, one for each of the prompts", None),
        ("np.zeros((3, 2))", "it is a ndarray of 3; expected 2", None),
        ("np.zeros(6)", "it is a ndarray of 6; expected 2", None),
        ("[1.0, 2.0]", "its item 0 is 1.0; expected a list of 3", 0),
        ("[[1, 2, 3], [1, 2]]", "its item 1 is a list of 2; expected 3, one for each of the candidates", 1),
        ("[[1, 2, 3], 'abc']", "its item 1 is 'abc'; expected a list of 3", 1),
        ("[[1, 2, 3], [1, None, 3]]", "its score [1][1] is None; expected a number", 1),
        ("[[1, 2, '3'], [1, 2, 3]]", "its score [0][2] is '3'; expected a number", 0),
        ("[[1, 2, True], [1, 2, 3]]", "its score [0][2] is True; expected a number", 0),
        ("[[1, 2, [3]], [1, 2, 3]]", "its score [0][2] is a list; expected a number", 0),
        ("[[1, 2, 3j], [1, 2, 3]]", "its score [0][2] is a complex; expected a number", 0),
        ("[[1, 2, 3], [math.inf, 2, 3]]", "its score [1][0] is inf; expected a finite number, or NaN", 1),
        ("[[1, 2, 3], [4, -math.inf, 3]]", "its score [1][1] is -inf; expected a finite number, or NaN", 1),
        ("[[10 ** 400, 2, 3], [4, 5, 6]]", "its score [0][0] is inf; expected a finite number, or NaN", 0),
    ],
)
def test_anything_but_scores_is_an_error(
    evaluator: Callable[[str], np.ndarray], expression: str, message: str, prompt: int | None
) -> None:
    with pytest.raises(RunFailed, match=re.escape(message)) as caught:
        evaluator(expression)
    text = str(caught.value)
    assert "ranker python:evaluator:score returned a wrong result on " in text
    assert "(n_prompts, n_candidates) numbers" in text
    named = {None: "on 2 prompts (0 ", 0: "on prompt 0 ", 1: "on prompt 1 'the second prompt': "}
    assert named[prompt] in text


@pytest.mark.parametrize("raised", ["ValueError('no such model')", "SystemExit('no such model')"])
def test_an_error_in_the_function_is_shown_with_its_prompts(ranker: Write, raised: str) -> None:
    spec = ranker(f"""
        def score(prompts, candidates):
            if "bad" in prompts:
                raise {raised}
            return [[0.0] * len(group) for group in candidates]
    """)
    with PythonScorer(spec, timeout_s=MINUTE) as scorer:
        with pytest.raises(RunFailed) as caught:
            scorer.score(["good", "bad", "x" * 100, "y", "last"], [["a"]] * 5)
        assert f"on 5 prompts (0 'good', 1 'bad', 2 '{'x' * 80}', ... 4 'last')" in str(caught.value)
        assert 'ranker.py", line 4, in score' in str(caught.value)
        assert "no such model" in str(caught.value)
        assert scorer.score(["good"], [["a"]]).tolist() == [[0.0]]  # the process goes on


# Finding the function


def test_modules_are_found_in_the_current_folder_and_on_the_path(
    ranker: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "helper.py").write_text("VALUE = 4.0\n")
    monkeypatch.syspath_prepend(str(elsewhere))
    assert str(tmp_path) not in sys.path
    spec = ranker("""
        import helper
        import os
        import sys
        from selm_fast.errors import RunFailed

        def score(prompts, candidates):
            return [[helper.VALUE + ("torch" in sys.modules)]]
    """)
    check_function(spec)
    assert score_one(spec).tolist() == [[4.0]]


def test_a_function_of_a_package_is_found(ranker: Write, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    write_module(tmp_path / "package", "inner", "def score(prompts, candidates): return [[7.0]]\n")
    assert score_one("python:package.inner:score").tolist() == [[7.0]]


def test_checking_a_function_does_not_call_it(ranker: Write, tmp_path: Path) -> None:
    check_function(
        ranker("""
        def score(prompts, candidates):
            open("called", "w").close()
    """)
    )
    assert not (tmp_path / "called").exists()


REFUSED = {
    "spec": ("score = 1", "ranker", "ranker is 'ranker'; expected python:MODULE:FUNCTION"),
    "no module": ("", "python:rankr:score", "No module named 'rankr'"),
    "no function": ("def scores(p, c): pass", "python:ranker:score", "has no 'score'; did you mean 'scores'?"),
    "not callable": ("score = 3", "python:ranker:score", "score of ranker ({folder}/ranker.py) is 3, not a function"),
    "one argument": (
        "def score(prompts): pass",
        "python:ranker:score",
        "cannot be called with (prompts, candidates): too many positional arguments",
    ),
    "async": ("async def score(p, c): pass", "python:ranker:score", "is an async function"),
    "syntax": ("def score(:", "python:ranker:score", "SyntaxError"),
    "error": ("raise OSError('no weights here')", "python:ranker:score", "OSError: no weights here"),
    "exit": ("import sys; sys.exit('bye')", "python:ranker:score", "SystemExit: bye"),
    "crash": ("import os; os._exit(3)", "python:ranker:score", "ended with exit code 3 while it imported ranker"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_ranker_is_refused_before_any_work(ranker: Write, tmp_path: Path, case: str) -> None:
    source, spec, message = REFUSED[case]
    ranker(source)
    with pytest.raises(Refused, match=re.escape(message.format(folder=tmp_path))) as caught:
        check_function(spec)
    assert spec in str(caught.value)


def test_a_scorer_refuses_what_the_check_refuses(ranker: Write) -> None:
    with pytest.raises(Refused, match="has no 'score'"), PythonScorer(ranker("x = 1"), timeout_s=MINUTE):
        pass
    with pytest.raises(Refused, match="expected python:MODULE:FUNCTION"):
        PythonScorer("ranker.py", timeout_s=MINUTE)


def test_a_module_that_imports_for_too_long_is_refused(ranker: Write) -> None:
    with pytest.raises(Refused, match=r"importing ranker took longer than 0.2 s"):
        check_function(ranker(f"import time\ntime.sleep({MINUTE})"), timeout_s=0.2)


def test_the_limit_of_a_call_is_not_that_of_importing(ranker: Write) -> None:
    spec = ranker("""
        import time

        time.sleep(0.3)

        def score(prompts, candidates):
            pass
    """)
    with PythonScorer(spec, timeout_s=0.001):
        pass


# What passes between the two processes


def test_what_the_function_prints_goes_to_standard_error(ranker: Write, capfd: pytest.CaptureFixture[str]) -> None:
    spec = ranker("""
        import os, subprocess, sys

        print("while importing")

        def score(prompts, candidates):
            print("x" * 100_000)
            sys.__stdout__.write("to the first stdout")
            os.write(1, b"to the file descriptor")
            subprocess.run([sys.executable, "-c", "print('from a program')"], check=True)
            sys.stdout.close()
            assert sys.stdin.read() == ""
            return [[1.0]]
    """)
    assert score_one(spec).tolist() == [[1.0]]
    out, err = capfd.readouterr()
    assert out == ""
    for text in ("while importing", "to the first stdout", "to the file descriptor", "from a program", "x" * 100_000):
        assert text in err


def test_texts_arrive_as_they_are(ranker: Write) -> None:
    texts = ["", "zwölf\r\n\t", "\x00", "\ud800", "😀\u2028", '"\\', "a" * 300_000]
    spec = ranker("""
        def score(prompts, candidates):
            assert type(prompts) is list and type(candidates[0]) is list
            return [[float(sum(map(ord, text))) + len(prompts[0]) for text in candidates[0]]]
    """)
    scores = score_one(spec, prompt="é\ud800\n", texts=texts)
    assert scores.tolist() == [[float(sum(map(ord, text))) + 3 for text in texts]]


@pytest.mark.parametrize("module", ["scorer", "candidates", "win_rate"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, selm_fast.iteration.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "False\n"


def test_the_callers_script_is_not_run_again(ranker: Write, tmp_path: Path) -> None:
    spec = ranker("def score(prompts, candidates): return [[2.0]]")
    (tmp_path / "script.py").write_text(
        dedent(f"""
            from selm_fast.iteration.scorer import PythonScorer

            print("once")
            with PythonScorer({spec!r}, timeout_s=60) as scorer:
                print(scorer.score(["p"], [["a"]]).tolist())
        """)
    )
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert (done.stdout, done.stderr, done.returncode) == ("once\n[[2.0]]\n", "", 0)


def test_one_process_serves_all_calls_and_ends_in_order(ranker: Write, tmp_path: Path) -> None:
    spec = ranker("""
        import atexit, os, time

        calls = 0

        @atexit.register
        def end():
            time.sleep(0.2)
            open("ended", "w").write(str(calls))

        def score(prompts, candidates):
            global calls
            calls += 1
            return [[calls, os.getpid()]]
    """)
    with PythonScorer(spec, timeout_s=MINUTE) as scorer:
        results = [scorer.score(["p"], [["a", "b"]]).tolist()[0] for _ in range(3)]
    assert [calls for calls, _ in results] == [1, 2, 3]
    assert len({process for _, process in results} - {os.getpid()}) == 1
    assert (tmp_path / "ended").read_text() == "3"
    with pytest.raises(ProcessLookupError):
        os.kill(int(results[0][1]), 0)


def test_ctrl_c_and_sigterm_are_the_parents_and_programs_of_the_function_obey_them(ranker: Write) -> None:
    spec = ranker("""
        import os, signal, subprocess, sys

        def score(prompts, candidates):
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            program = subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"])
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            return [[program.returncode, os.waitstatus_to_exitcode(status)]]
    """)
    assert score_one(spec, texts=("a", "b")).tolist() == [[-15.0, -15.0]]


# Calls that do not come back


class Pipe:
    """A named pipe that a worker holds open: `rest` reads it to its end, which is the end of every process with it.

    A process that goes on to the end of its work writes "finished" instead.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._keep = os.open(path, os.O_WRONLY)  # until a worker has it open too
        os.set_blocking(self._fd, True)

    def first(self) -> bytes:
        return os.read(self._fd, 1)

    def rest(self) -> bytes:
        os.close(self._keep)
        data = b""
        while not data.endswith(b"finished") and (part := os.read(self._fd, 100)):
            data += part
        os.close(self._fd)
        return data


HANG = f"""
    import ctypes, os, subprocess, sys, time

    pipe = os.open("pipe", os.O_WRONLY)
    os.set_inheritable(pipe, True)

    def finish(wait):
        wait()
        os.write(pipe, b"finished")

    def sleep():
        time.sleep({MINUTE})

    def loop():
        end = time.monotonic() + {MINUTE}
        while time.monotonic() < end:
            pass

    def hold_the_gil():
        ctypes.PyDLL(None).sleep({int(MINUTE)})

    def program():
        code = "import os, sys, time; time.sleep({MINUTE}); os.write(int(sys.argv[1]), b'finished')"
        subprocess.run([sys.executable, "-c", code, str(pipe)], close_fds=False)

    def score(prompts, candidates):
        os.write(pipe, b"a")
        if prompts[0] != "idle":
            finish(globals()[prompts[0]])
        return [[0.0]]
"""


@pytest.mark.parametrize("how", ["sleep", "hold_the_gil", "program"])
def test_a_call_that_takes_too_long_is_ended_with_all_it_started(
    ranker: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    pipe = Pipe(tmp_path / "pipe")
    with PythonScorer(ranker(HANG), timeout_s=0.3) as scorer:
        with pytest.raises(RunFailed) as caught:
            scorer.score([how], [["a"]])
        assert pipe.rest() in (b"a", b"")
    text = str(caught.value)
    assert text.startswith(f"ranker python:ranker:score: no answer within 0.3 s on prompt 0 '{how}'; its process was")
    assert "rank.timeout_s" in text


def test_where_a_call_hung_is_written_down(ranker: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = Pipe(tmp_path / "pipe")
    limit = 0.3
    while True:  # a slow machine may not get there before the process is killed; it is given more time then
        with PythonScorer(ranker(HANG), timeout_s=limit) as scorer, pytest.raises(RunFailed, match="no answer within"):
            scorer.score(["sleep"], [["a"]])
        if "in sleep" in capfd.readouterr().err or limit > MINUTE / 4:
            break
        limit *= 2
    assert limit <= MINUTE / 4
    pipe.rest()


def test_the_limit_of_one_call_does_not_end_the_next(ranker: Write) -> None:
    """Seen from inside, where the timer that ends the process is set and stopped: no time has to pass."""
    spec = ranker("""
        import faulthandler

        counts = {}

        def counted(name):
            function = getattr(faulthandler, name)

            def call(*arguments, **settings):
                counts[name] = counts.get(name, 0) + 1
                return function(*arguments, **settings)

            setattr(faulthandler, name, call)

        counted("dump_traceback_later")
        counted("cancel_dump_traceback_later")

        def score(prompts, candidates):
            return [[counts.get("dump_traceback_later", 0), counts.get("cancel_dump_traceback_later", 0)]]
    """)
    with PythonScorer(spec, timeout_s=MINUTE) as scorer:
        assert [scorer.score(["p"], [["a", "b"]]).tolist() for _ in range(2)] == [[[1, 1]], [[2, 2]]]


def test_a_limit_may_be_longer_than_any_clock(ranker: Write) -> None:
    assert score_one(ranker("def score(p, c): return [[1.0]]"), timeout_s=1e300).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("os._exit(3)", "its process ended with exit code 3 on prompt 0 'p'"),
        ("os.kill(os.getpid(), 9)", "its process was killed by SIGKILL (the kernel does that where memory runs out)"),
        ("ctypes.string_at(0)", "its process was killed by SIGSEGV on prompt 0 'p'"),
    ],
)
def test_a_process_that_dies_is_an_error_that_says_how(ranker: Write, ending: str, message: str) -> None:
    spec = ranker(f"""
        import ctypes, os, resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        def score(prompts, candidates):
            {ending}
    """)
    with pytest.raises(RunFailed, match=re.escape(message)):
        score_one(spec)


def test_a_process_that_dies_takes_what_it_started_with_it_and_is_not_waited_for(ranker: Write, tmp_path: Path) -> None:
    """A program that inherits every open file must not keep the end of the socket open."""
    pipe = Pipe(tmp_path / "pipe")
    spec = ranker(f"""
        import os, subprocess, sys

        pipe = os.open("pipe", os.O_WRONLY)
        os.set_inheritable(pipe, True)

        def score(prompts, candidates):
            code = "import os, sys, time; time.sleep({MINUTE}); os.write(int(sys.argv[1]), b'finished')"
            subprocess.Popen([sys.executable, "-c", code, str(pipe)], close_fds=False)
            os._exit(3)
    """)
    with pytest.raises(RunFailed, match="ended with exit code 3"):
        score_one(spec)
    assert pipe.rest() == b""


def test_what_was_printed_before_a_crash_is_not_lost(
    ranker: Write, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    spec = ranker("""
        import os

        def score(prompts, candidates):
            print("seen before the end")
            os._exit(3)
    """)
    with pytest.raises(RunFailed, match="ended with exit code 3"):
        score_one(spec)
    assert "seen before the end" in capfd.readouterr().err


def test_a_process_that_died_between_two_calls_is_an_error_that_says_how(ranker: Write) -> None:
    spec = ranker("""
        import os

        def score(prompts, candidates):
            return [[os.getpid()]]
    """)
    with PythonScorer(spec, timeout_s=MINUTE) as scorer:
        os.kill(int(scorer.score(["p"], [["a"]])[0, 0]), signal.SIGKILL)
        with pytest.raises(RunFailed, match="was killed by SIGKILL"):
            scorer.score(["p"], [["a" * 1_000_000]])


@pytest.mark.parametrize("how", ["idle", pytest.param("loop", marks=pytest.mark.slow), "program", "hold_the_gil"])
def test_the_process_ends_when_its_parent_is_killed(ranker: Write, tmp_path: Path, how: str) -> None:
    pipe = Pipe(tmp_path / "pipe")
    limit = 2.0 if how == "hold_the_gil" else MINUTE  # no thread of Python's runs there to see the parent go
    worker = scorer_worker.__file__
    patient, count = re.subn(r"GRACE_S: Final = \d+\.0", "GRACE_S: Final = 3600.0", Path(worker).read_text())
    assert count == 1
    (tmp_path / "patient_worker.py").write_text(patient)  # that ends in order or at once, not after a while
    (tmp_path / "parent.py").write_text(
        dedent(f"""
            import time
            from pathlib import Path
            from selm_fast.iteration import scorer
            from selm_fast.iteration.scorer import PythonScorer

            scorer.WORKER = Path("patient_worker.py")
            with PythonScorer({ranker(HANG)!r}, timeout_s={limit}) as ranker:
                ranker.score([{how!r}], [["a"]])
                time.sleep({MINUTE})
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "parent.py"], env=environment, stderr=subprocess.DEVNULL) as parent:
        assert pipe.first() == b"a"
        parent.kill()
    assert pipe.rest() == b""


def test_a_request_that_is_cut_off_is_the_end() -> None:
    """As where the parent is killed while it writes one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, scorer_worker.__file__, str(theirs.fileno())]
        worker = subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=(theirs.fileno(),), process_group=0)
        ours.sendall((100).to_bytes(8, "big") + b'{"path": [')
    assert worker.communicate() == (None, b"")
    assert worker.returncode == 0


def test_leaving_the_block_while_the_function_runs_ends_it(ranker: Write, tmp_path: Path) -> None:
    """As a second Ctrl-C does, which interrupts the wait for the scores."""
    pipe = Pipe(tmp_path / "pipe")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), PythonScorer(ranker(HANG), timeout_s=MINUTE) as scorer:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            scorer.score(["loop"], [["a"]])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert pipe.rest() in (b"a", b"")


# Equal candidates


def recorded(prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[Any]]:
    """Scores and batches of `score_distinct` with a scorer that adds up the lengths of a prompt's candidates."""
    batches = []

    def score_batch(indices: list[int], texts: list[list[str]]) -> np.ndarray:
        batches.append((indices, texts))
        return np.array(
            [[100.0 * index + len(text) for text in group] for index, group in zip(indices, texts, strict=True)]
        )

    return score_distinct(prompts, candidates, score_batch), batches


def test_candidates_without_equals_are_scored_in_one_call() -> None:
    scores, batches = recorded(["p", "q"], [["a", "bb"], ["ccc", "dddd"]])
    assert scores.tolist() == [[1, 2], [103, 104]]
    assert batches == [([0, 1], [["a", "bb"], ["ccc", "dddd"]])]


def test_equal_candidates_are_scored_once_in_rectangular_batches() -> None:
    groups = [["a", "bb", "ccc"], ["bb", "a", "bb"], ["", "", ""], ["ccc", "ccc", "a"], ["x", "yy", "zzz"]]
    scores, batches = recorded(list("pqrst"), groups)
    assert scores.tolist() == [[1, 2, 3], [102, 101, 102], [200, 200, 200], [303, 303, 301], [401, 402, 403]]
    assert batches == [
        ([0, 4], [["a", "bb", "ccc"], ["x", "yy", "zzz"]]),
        ([1, 3], [["bb", "a"], ["ccc", "a"]]),
        ([2], [[""]]),
    ]


def test_no_prompts_are_no_call() -> None:
    scores, batches = recorded([], [])
    assert scores.size == 0
    assert batches == []


@pytest.mark.parametrize("candidates", [[["a"]], [["a"], ["b", "c"]], [[], []]])
def test_candidates_have_to_form_a_rectangle(candidates: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="one list for each prompt, all of one length, 1 or more"):
        recorded(["p", "q"], candidates)


def test_the_function_gets_distinct_candidates_and_errors_name_the_callers_prompts(ranker: Write) -> None:
    spec = ranker("""
        import json

        def score(prompts, candidates):
            with open("calls", "a") as file:
                print(json.dumps([prompts, candidates]), file=file)
            return [[float(text) for text in group] for group in candidates]
    """)
    with PythonScorer(spec, timeout_s=MINUTE) as scorer:
        scores = scorer.score(["p", "q", "r"], [["1", "2"], ["3", "3"], ["4", "5"]])
        assert scores.tolist() == [[1, 2], [3, 3], [4, 5]]
        with pytest.raises(RunFailed, match=re.escape("on prompt 2 'r': its score [1][0] is inf")):
            scorer.score(["p", "q", "r"], [["1", "1"], ["2", "3"], ["inf", "inf"]])
    calls = [json.loads(line) for line in Path("calls").read_text().splitlines()]
    assert calls[:2] == [[["p", "r"], [["1", "2"], ["4", "5"]]], [["q"], [["3"]]]]
