"""An exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from dreamlip_train.jobs.user_error import UserError


def upload(folder: Path, repository: str) -> str:
    """Put ``folder`` into the private repository OWNER/NAME, which is made where it is not there; returns its address.

    The token is huggingface_hub's own (``hf auth login``, or HF_TOKEN).

    Raises:
        UserError: the Hub cannot be reached or does not let this token write there; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="dreamlip-train export")
    except Exception as error:  # its own errors, and those of the HTTP library that it happens to use
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--push: {repository!r} could not be written: {reason}. {str(folder)!r} is complete: "
            f"hf upload {repository} {folder}"
        ) from error
    return f"{api.endpoint}/{repository}"
