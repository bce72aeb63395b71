"""Signatures of folders by OpenSSF's model-signing: one detached file over the sha256 of every other file.

Keys are elliptic (P-256) in PEM files. A signature proves who signed only against a public key that came another way than
the folder did; against one that lies in the folder it proves no more than that the folder is as its maker left it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.contracts.errors import ConfigError, StoreError, TamperedArtefact
from components.store import fsync_folder, write_atomically

MAX_BYTES = 4 << 20
"""Of a signature or a key."""


def own_key(folder: Path) -> Path:
    """The private key in `folder`, made at the first call, for its owner alone; `key.pub` beside it is the public one."""
    key = folder / "key.pem"
    if not key.exists():
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        made = ec.generate_private_key(ec.SECP256R1())
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = folder / f".key.{os.getpid()}"
        partial.unlink(missing_ok=True)  # of a call that was killed
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # then another process was first, and its key is the one
            os.link(partial, key)
        partial.unlink()
        fsync_folder(folder)
    write_atomically(folder / "key.pub", public_key(key))
    return key


def public_key(key: Path) -> bytes:
    """PEM of the public key that belongs to a private one; raises ConfigError for a file that holds none."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        found = load_pem_private_key(_small(key), password=None)
    except OSError as error:
        raise ConfigError(f"the key {key} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key} is not a private key in PEM without a password ({error})") from None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{key} is no elliptic key; make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
        )
    public: bytes = found.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


def fingerprint(public: bytes) -> str:
    """sha256 of a public key's PEM, as a signature names it."""
    return hashlib.sha256(public).hexdigest()


def sign(folder: Path, signature: Path, key: Path) -> None:
    """Write the signature of every file of `folder`, where it lies itself; raises ConfigError for a key that cannot sign."""
    public_key(key)
    with _library() as library:
        signing = library.signing.Config().use_elliptic_key_signer(private_key=key)
        signing.set_hashing_config(_hashing(library, folder, signature)).sign(folder, signature)


def verify(folder: Path, signature: Path, public: Path) -> str:
    """The fingerprint of the key by which every file of `folder` is signed; raises TamperedArtefact or ConfigError."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        pem = _small(public)
    except OSError as error:
        raise ConfigError(f"the key {public} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{public} is not a public key in PEM ({error})") from None
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise ConfigError(f"{public} is not a public key in PEM; expected a file with BEGIN PUBLIC KEY in it") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{public} is no elliptic key, and nothing of visionloop's is signed by another kind")
    if signature.stat().st_size > MAX_BYTES:
        raise TamperedArtefact(f"the signature has more than {MAX_BYTES} bytes")
    with _library() as library:
        try:
            verifying = library.verifying.Config().use_elliptic_key_verifier(public_key=public)
            verifying.set_hashing_config(_hashing(library, folder, signature)).verify(folder, signature)
        except Exception as error:
            # On bytes of somebody else's the library raises almost anything.
            raise TamperedArtefact(
                f"it is not signed by the key {public.name}: another key made its signature, or that was damaged"
            ) from error
    return fingerprint(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def _small(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return data


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries behind it, about each other
            import model_signing
            import model_signing.signing
            import model_signing.verifying
    except ImportError as error:
        raise StoreError(
            f"signatures need the package model-signing, which is not installed here ({error}); run: make setup"
        ) from None
    yield model_signing


def _hashing(library: Any, folder: Path, signature: Path) -> Any:
    """Every file but the signature, hidden ones too, which the library would leave out by default."""
    config = library.hashing.Config().use_file_serialization(max_workers=1)
    return config.set_ignored_paths(paths=[signature.relative_to(folder)], ignore_git_paths=False)
