"""Push folders to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in the module's __all__

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.folders import MANIFEST
from opsd_lightning.utils.terminal import safe_text


def check_hub_id(repo: str, setting: str) -> None:
    """Check the form of a hub id.

    Raises:
        ConfigError: The id is malformed.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ConfigError(f"{repo!r} is not the id of a repository", setting, "Write it as NAMESPACE/NAME") from None


def check_push(repo: str, private: bool, setting: str) -> str:
    """Check that this machine may push to a model repository of the hub. Nothing is created.

    Args:
        repo: Hub id. Without a namespace, the account's own is used.
        private: True if the repository must not be public.
        setting: Name of the setting that holds the id, for errors.

    Returns:
        The hub id with its namespace.

    Raises:
        ConfigError: The id is malformed, ``HF_HUB_OFFLINE`` is set, the hub cannot be reached, there is no valid token, the
            token may not write to the repository, or the repository is public and must be private.
    """
    later = f"remove {setting.rpartition('.')[2]} and push the folder after training"
    check_hub_id(repo, setting)
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, and the export is pushed to the hub", setting, f"Unset it, or {later}")
    if get_token() is None:
        fix = f"Run `hf auth login`, or set HF_TOKEN, or {later}"
        raise ConfigError("there is no token for the hub", setting, fix)
    api, access = HfApi(), "Create a token with write access, and run `hf auth login` or set HF_TOKEN"
    try:
        account = api.whoami()
    except Exception as error:  # the HTTP client's own errors differ between versions
        if _status(error) in (401, 403):
            raise ConfigError("the hub does not accept the token", setting, access) from None
        raise ConfigError(f"cannot reach the hub ({_reason(error)})", setting, f"Try again, or {later}") from None
    if (problem := _token_problem(account)) is not None:
        raise ConfigError(problem, setting, access)
    namespace, _, name = repo.rpartition("/")
    namespace = namespace or account["name"]
    repo = f"{namespace}/{name}"
    names = [account["name"], *(each["name"] for each in account.get("orgs", []))]
    try:
        public = not api.model_info(repo).private
    except RepositoryNotFoundError:
        if namespace.lower() not in map(str.lower, names):
            problem = (
                f"{repo} does not exist, and {namespace!r} is neither the account of the token nor one of its organizations"
            )
            raise ConfigError(problem, setting, f"Choose one of {', '.join(names)}") from None
        return repo
    except Exception as error:
        raise ConfigError(f"cannot look {repo} up ({_reason(error)})", setting, f"Try again, or {later}") from None
    if public and private:
        raise _is_public(repo, setting)
    try:
        api.auth_check(repo, write=True)
    except Exception as error:
        problem = f"the token may not write to {repo} ({_reason(error)})"
        raise ConfigError(problem, setting, access) from None
    return repo


def push_folder(folder: Path, repo: str, private: bool, message: str) -> str:
    """Push an exported folder to a model repository of the hub, which is created if it does not exist.

    Args:
        folder: The folder.
        repo: Hub id with its namespace.
        private: If True, the repository must be private. If False, a new one is public, and an existing one stays as it is.
        message: Message of the commit.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: The repository is public and must be private. Nothing is pushed.
    """
    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:  # created or published since `check_push`
        raise _is_public(repo, "hub_private")
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=[MANIFEST])
    return str(url)


def _is_public(repo: str, setting: str) -> ConfigError:
    fix = "Set hub_private to false to publish the export, or choose another repository"
    return ConfigError(f"{repo} is public, and hub_private is true", setting, fix)


def push_command(folder: Path, repo: str, private: bool) -> str:
    """Return the command that pushes like `push_folder`. It does not check that an existing repository is private."""
    arguments = ["hf", "upload", repo, str(folder), ".", *(["--private"] if private else []), "--exclude", MANIFEST]
    return shlex.join(arguments)


def _token_problem(account: dict[str, Any]) -> str | None:
    """Return the reason why a token can write to no repository, or None."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return "the token can only read"
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and isinstance(scopes, list):
        granted = {permission for scope in scopes for permission in scope.get("permissions", [])}
        if "repo.write" not in granted:
            return "the fine-grained token has no permission to write to repositories"
    return None


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> str:
    status = _status(error)
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return safe_text(f"status {status}" if status is not None else text)[:200]
