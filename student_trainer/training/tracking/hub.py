"""The Hugging Face hub: whether it will take the model is asked before a run; what goes wrong after it never costs the run.

In: `train.push_to_hub` and a finished run's folder; out: an upload of final/. The token is huggingface_hub's own.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from student_trainer.config.run import TrainConfig
from student_trainer.errors import ConfigError, RunError


class HubError(RunError):
    """The hub did not take a finished model, which is whole in its folder; trying again needs no training."""

    exit_code = 75


def check_hub(config: TrainConfig) -> None:
    """Asks the hub who we are, before hours of training depend on it.

    Raises:
        ConfigError: offline, no token, or one that the hub does not know; with what to do.
    """
    if not config.train.push_to_hub:
        return
    setting = f"train.push_to_hub to {config.train.hub_id}"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{setting}: HF_HUB_OFFLINE=1 forbids it: unset the variable, or set train.push_to_hub=false")
    if get_token() is None:
        raise ConfigError(f"{setting}: there is no token: hf auth login, or set HF_TOKEN; one with the right to write")
    try:
        HfApi().whoami()
    except (
        Exception
    ) as error:  # of the network, or of the hub: each has a class of its own, and its library has changed them
        raise ConfigError(
            f"{setting}: the hub does not know us: {_said(error)}; hf auth login, or train.push_to_hub=false"
        ) from error


def push(config: TrainConfig, folder: Path) -> str:
    """Uploads final/ of a finished run; returns where it is to be seen.

    Raises:
        HubError: it was not taken; says how to try again.
    """
    hub_id = config.train.hub_id
    assert hub_id is not None
    api = HfApi()
    try:
        api.create_repo(hub_id, private=config.train.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=folder, commit_message=f"{config.run.output_dir.name}: trained by Lyceum"
        )
    except Exception as error:  # of the network, the hub, or a file that it refuses: each has a class of its own
        raise HubError(
            f"the run is finished and its model whole in {folder}, but the hub did not take it as {hub_id}: {_said(error)}; to try again: "
            f"hf upload {hub_id} {folder}, or the same command with --resume"
        ) from error
    return f"{constants.ENDPOINT}/{hub_id}"


def _said(error: BaseException) -> str:
    """In one line, without the token, which no message of the hub's holds and no header of ours is allowed to bring in."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    token = get_token()
    return said.replace(token, "***") if token else said
