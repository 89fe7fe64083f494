"""Functions in Python files of the user's: networks and methods of one's own."""

import importlib.util
import sys
from functools import wraps
from importlib.machinery import PathFinder
from modulefinder import _PKG_DIRECTORY, ModuleFinder
from pathlib import Path


def is_user_function(name):
    """Whether a name is that of a function of the user's, ``FILE.py:NAME``."""
    return ".py:" in str(name)


def user_function(name):
    """A function in a Python file of the user's, which may import its neighbours.

    Files in different folders may have neighbours of the same name: each function runs with those
    of its own folder.

    Parameters
    ----------
    name : str
        ``FILE.py:NAME``. As a network, the function takes nothing and returns an ``nn.Module``
        for RGB 0..1 in and out, with an attribute ``scale`` and, if only some of its
        convolutions are to be quantized, their name patterns as ``body_layers``. Photographs of
        more than a megapixel are upscaled in strips if it has ``features``, ``reconstruct`` and
        ``reach``, see ``dfsq.study.large``. For a method see
        :class:`dfsq.study.benchmark.Cell`.

    Raises
    ------
    ValueError
        If there is no such file or function, the file does not run, or it gets another module in
        the place of a neighbour.
    """
    path, _, function = str(name).rpartition(":")
    neighbours = _Neighbours(Path(path).resolve().parent, user_sources(name))
    neighbours.enter()
    spec = importlib.util.spec_from_file_location(f"dfsq_user_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script may end in sys.exit(main())
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
    neighbours.check(path)
    made = getattr(module, function, None)
    if not callable(made):
        raise ValueError(f"{path} has no function {function!r}")

    @wraps(made)
    def among_its_neighbours(*args):
        neighbours.enter()  # it may import some of them only now
        result = made(*args)
        neighbours.check(path)
        return result

    return among_its_neighbours


class _Neighbours:
    """The modules in the folder of a user's file; those of one file at a time can be imported."""

    entered = None

    def __init__(self, folder, sources):
        self.folder = folder
        self.files = {module: file for module, file in sources.items() if module != "__main__"}
        self.tops = {module.partition(".")[0] for module in self.files}
        self.modules = {}

    def enter(self):
        """Let this folder's modules be imported, and no other user's."""
        if _Neighbours.entered is self:
            return
        if _Neighbours.entered is not None:
            _Neighbours.entered._leave()
        self._take()  # of a file that was read before: it may have changed
        sys.modules.update(self.modules)
        sys.path.append(str(self.folder))  # last, so that it hides no module of others
        _Neighbours.entered = self

    def _leave(self):
        self.modules = self._take()
        if str(self.folder) in sys.path:
            # the last of them is the one that was added
            sys.path.reverse()
            sys.path.remove(str(self.folder))
            sys.path.reverse()

    def _take(self):
        """This folder's modules, no longer to be found by name."""
        own = [name for name in sys.modules if name.partition(".")[0] in self.tops]
        return {name: sys.modules.pop(name) for name in own if self._holds(sys.modules[name])}

    def _holds(self, module):
        file = getattr(module, "__file__", None)
        places = [file] if file else getattr(module, "__path__", ())  # a package without a file
        return any(Path(place).resolve().is_relative_to(self.folder) for place in places)

    def check(self, path):
        """Refuse a module that is not the neighbour by whose text a row would be known."""
        for name, file in self.files.items():
            found = getattr(sys.modules.get(name), "__file__", file)
            if Path(found or "").resolve() != file:
                raise ValueError(
                    f"{path} imports {name!r} and gets {found}, not its neighbour {file}; "
                    "give the neighbour a name that no other module has"
                )


class _Finder(ModuleFinder):
    """The modules that a file imports, packages without an ``__init__.py`` among them."""

    def find_module(self, name, path, parent=None):
        spec = PathFinder.find_spec(name, self.path if path is None else path)
        if spec is not None and spec.origin is None and spec.submodule_search_locations is not None:
            return None, next(iter(spec.submodule_search_locations)), ("", "", _PKG_DIRECTORY)
        return super().find_module(name, path, parent)

    def load_package(self, fqname, pathname):
        if (Path(pathname) / "__init__.py").is_file():
            return super().load_package(fqname, pathname)
        module = self.add_module(fqname)
        module.__path__ = [pathname]
        return module


def user_sources(name):
    """The Python files that a function of the user's depends on, as far as they are its neighbours.

    Parameters
    ----------
    name : str
        See :func:`user_function`.

    Returns
    -------
    dict of Path
        By the names of their modules, in order: the file itself, ``__main__``, and what it imports
        from its own folder, those files from there, and so on.

    Raises
    ------
    ValueError
        If there is no such file, or it does not compile.
    """
    path = Path(str(name).rpartition(":")[0])
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {path}")
    path = path.resolve()
    # a file in the folder of a checkout sees this package, too, which has versions of its own
    finder = _Finder(path=[str(path.parent)], excludes=["dfsq"])
    try:
        finder.run_script(str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
    files = {name: module.__file__ for name, module in finder.modules.items()}
    return {name: Path(files[name]) for name in sorted(files) if files[name]}
