"""What the scripts in experiments/ share: the --config flag, one-sentence errors, JSON output."""

import dataclasses
import errno
import logging
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from moe_jax import component, huge_pages
from moe_jax.errors import UserError, names_instead, user_error_behind, where_it_failed
from moe_jax.parallel import ending
from moe_jax.training.experiment import Experiment
from moe_jax.training.loop import Interrupted

# So that --help shows a script's own flags and those that it adopts, and no module's between them.
flags.disclaim_key_flags()

USER_ERROR_STATUS = 2
# What Python and absl say of a flag's value of another kind, and what is wanted.
_WANTED = {
    r"invalid literal for int\(\)": "a whole number",
    "could not convert string to float": "a number",
    r"\('Non-boolean argument to boolean flag'": "true or false",
    r"value should be one of <(.*)>": r"one of \1",
    r"\S+ is not a positive integer": "at least 1",
    r"\S+ is not a non-negative (?:integer|number)": "at least 0",
}
# What to do about an operating system's error, by its number; for all others see `_of_system`.
_REMEDIES = {
    errno.ENOENT: "name a path in a folder that exists",
    errno.EEXIST: "it is a file, so name a folder",
    errno.ENOTDIR: "a part of it is a file, so name a folder",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "name what the links are meant to lead to",
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
}


_IMPORT = flags.DEFINE_multi_string(
    "import", [], "Module or file that defines classes of the run's config; may be given again."
)


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE and --config.any.field=value."""
    return config_flags.DEFINE_config_file(
        "config", None, "Python file with a get_config() that returns an Experiment."
    )


def experiment(config: Any) -> Experiment:
    """The value of --config.

    Raises:
      UserError: no file was named, or its get_config returns something else.
    """
    try:
        is_config = hasattr(config, "steps") and isinstance(config, Experiment)
    except OSError as error:  # ml_collections complains at the first access to a field only.
        raise UserError(_unopened(str(error))) from error
    if config is None:
        raise UserError(
            "--config gives no config; name a file whose get_config() returns an Experiment, such as "
            "--config=configs/quickstart.py."
        )
    if not is_config:
        raise UserError(
            f"--config gives a {type(config).__name__}; its get_config() must return an Experiment, as "
            "that of configs/quickstart.py does."
        )
    return config


def _unopened(message: str) -> str:
    """Why ml_collections could not open the file of --config, whose message ends with Python's own."""
    found = re.search(r"\[Errno \d+\] (.*?): '(.*)'\s*$", message, re.DOTALL)
    reason, name = (found[1], found[2]) if found else ("it is empty", "")
    name = name if len(name) <= 200 else f"{name[:200]}..."
    return (
        f"--config={name} cannot be opened ({reason}); name a Python file with get_config(), such as "
        "--config=configs/quickstart.py."
    )


def run_command(command: ModuleType) -> None:
    """Runs the `main` of a module of `moe_jax.commands`; --help shows its text and its flags."""
    flags.adopt_module_key_flags(command)
    sys.modules["__main__"].__doc__ = command.__doc__
    run(command.main)


def run(main: Callable[[], None], default_config: str | None = None) -> None:
    """Runs a script: parses flags, calls `main`, and tells the user in one sentence what was wrong.

    Args:
      main: the script.
      default_config: what --config is if the user names no file.

    Exit status: 0 done; 143 stopped by SIGTERM after saving, and 130 by Ctrl-C; 2 the user asked for
    something impossible. Several processes all end with the status of the one that failed, or with 134
    where one was killed.
    """
    # Not as the flag's default, which absl would read before `parse_flags` can catch its errors.
    if default_config and not any(re.fullmatch(r"--config(=.*)?", a) for a in sys.argv):
        sys.argv.insert(1, f"--config={default_config}")
    # Config files import what papers share: configs.shared, or another paper's configs.<paper>.
    sys.path.append(str(pathlib.Path(sys.argv[0]).resolve().parents[1]))
    report_to_user(lambda: app.run(lambda argv: _main(main, argv), flags_parser=parse_flags))


def report_to_user(main: Callable[[], None]) -> None:
    """Calls `main`, with our log on stderr; ends the process as `run` says.

    A process that did not start with memory in huge pages starts again, before anything is done.
    """
    huge_pages.restart_with_them()
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("moe_jax").setLevel(logging.INFO)  # Ours speaks, the libraries only warn.
    try:
        main()
    except UserError as error:
        _fail(str(error), USER_ERROR_STATUS)
    except BrokenPipeError:  # The reader of our output has seen enough, as `| head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        _fail(_of_system(error), USER_ERROR_STATUS)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Interrupted as stopped:
        _stop(str(stopped), 128 + stopped.signal_number)


def _of_system(error: OSError) -> str:
    """What the operating system would not do, in one sentence: missing, full, forbidden, unreachable."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"the operating system refused: {reason}."
    path = str(error.filename)  # A number where a file was opened by its descriptor.
    remedy = _REMEDIES.get(error.errno or 0, "name a place that can be written to")
    if os.path.islink(path) and not os.path.exists(path):
        remedy = _REMEDIES[errno.ELOOP]
    name, value = _given_as(path)
    where = f"{name}={_shortened(value)}: " if name else ""
    where += "" if value == path else f"{_shortened(path)}: "
    return f"{where}{reason}; {remedy}."


def _shortened(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:200]}..."


def _given_as(path: str) -> tuple[str, str]:
    """The flag or config field whose value is `path` or a folder above it, and the value.

    Returns:
      such as ("--workdir", "runs/x"), the longest value of several; ("", "") where none is known.
    """
    try:
        here = os.getcwd()
    except OSError:  # It was removed, and relative paths lead nowhere.
        return "", ""
    target, best = os.path.normpath(os.path.join(here, path)), ("", "")
    for name, value in _given_texts():
        given = os.path.expanduser(value.removeprefix("hf:"))
        folder = os.path.normpath(os.path.join(here, given))
        # Much lies below "." or "/" for other reasons.
        below = target.startswith(folder + os.sep) and not f"{here}/".startswith(f"{folder}/")
        if (target == folder or below) and len(value) > len(best[1]):
            best = name, value
    return best


def _given_texts() -> Iterator[tuple[str, str]]:
    """All flags and fields of --config that are texts: ("--workdir", "runs/x")."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, Experiment):
            yield from _texts_of(value, f"--{name}")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text:
                yield f"--{name}", text


def _texts_of(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str) and node:
        yield path, node
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from _texts_of(getattr(node, field.name), f"{path}.{field.name}")


def _main(main: Callable[[], None], argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; flags are written --name=value.")
    keep_compiled_programs()
    for name in _IMPORT.value:
        component.import_named(name)
    main()


def keep_compiled_programs() -> None:
    """A second run of the same model starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.expanduser("~/.cache/moe_jax/compiled")
        jax.config.update("jax_compilation_cache_dir", cache)


def _fail(message: str, status: int) -> None:
    """Ends this process and the others of its run, which would wait for it."""
    ending.end(message, status)
    _stop(message, status)


def _stop(message: str, status: int) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(status)


def _with_shipped_configs(argv: Sequence[str]) -> list[str]:
    """The arguments, with --config=configs/... read from the package where no such file is here."""
    shipped = pathlib.Path(__file__).parent / "shipped"
    if not shipped.is_dir():
        return list(argv)
    sys.path.append(str(shipped))  # For what config files share.
    words = []
    for word in argv:
        flag, _, value = word.partition("=")
        path, colon, row = value.partition(":")
        missing = flag.lstrip("-") == "config" and not pathlib.Path(path).exists()
        found = missing and (shipped / path).is_file()
        words.append(f"{flag}={shipped / path}{colon}{row}" if found else word)
    return words


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's parser, with every complaint turned into one sentence.

    Raises:
      UserError: an unknown flag or config field, a missing flag, or a value of the wrong type.
    """
    try:
        return values(_with_shipped_configs(argv))
    except flags.Error as error:
        said = user_error_behind(error) or _sentence(str(error))
        raise UserError(str(said)) from error
    except OSError as error:
        raise UserError(_unopened(str(error))) from error
    except Exception as error:  # Whatever the user's own file raises.
        raise UserError(_wrong_config(argv, error)) from error


def _sentence(message: str) -> str:
    """absl writes in several lines and sentences, such as 'Unknown flag x. Did you mean: y ?'."""
    message = " ".join(message.split()).rstrip(".")
    if found := re.fullmatch(
        r"Unknown command line flag '(.*?)'(\. Did you mean: (.*?) \?)?", message
    ):
        near = f"the nearest is --{found[3]}" if found[3] else "--help lists all flags"
        return f"there is no flag --{found[1]}; {near}."
    if found := re.fullmatch(r"flag (--\w+)=None: Flag .* other than None", message):
        return f"{found[1]} is not given; write {found[1]}=VALUE, and --help says what it takes."
    if not (found := re.fullmatch(r"flag (--[\w.]+)=(.*?): (.*)", message)):
        return message + "."
    name, value, complaint = found.groups()
    for pattern, kind in _WANTED.items():
        if wanted := re.match(pattern, complaint):
            return f"{name} is {value!r}; it must be {wanted.expand(kind).replace('|', ', ')}."
    return f"{name} is {value!r}; {complaint}."


def _wrong_config(argv: Sequence[str], error: Exception) -> str:
    """What is wrong with the file of --config, or with a --config override."""
    name = _config_files(argv)[-1]
    file = pathlib.Path(name.partition(":")[0])
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or any(frame.filename == str(file) for frame in frames):
        return f"--config={name} cannot be read ({where_it_failed(error, file)})."
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return f"--config={name} has no get_config(); define one that returns an Experiment."
    if isinstance(error, (KeyError, AttributeError)):
        return _unknown_field(argv)
    raise error


def _config_files(argv: Sequence[str]) -> list[str]:
    words = " ".join(argv).replace("--config ", "--config=").split()
    return [word.removeprefix("--config=") for word in words if word.startswith("--config=")]


def _unknown_field(argv: Sequence[str]) -> str:
    """Finds the first --config override that names no field, and what was probably meant."""
    parser = config_flags.config_flags._ConfigFileParser("config")
    config: Any = parser.parse(_config_files(argv)[-1])
    for argument in argv:
        if not argument.startswith("--config."):
            continue
        path = argument.removeprefix("--config.").split("=", 1)[0].split(".")
        node, seen = config, "config"
        for name in path:
            known = sorted(vars(node)) if hasattr(node, "__dict__") else []
            if name not in known:
                given = f"--config.{'.'.join(path)}"
                if not known:
                    return f"{given}: {seen} has no fields; set {seen} in the config file."
                everything = component.documentation(type(node))
                instead = names_instead(name, known, "fields", everything)
                return f"{given}: {seen} has no field {name!r}; {instead}."
            node, seen = getattr(node, name), f"{seen}.{name}"
    return "a --config override names a field that does not exist."
