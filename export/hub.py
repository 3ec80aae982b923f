"""Exported models on the Hugging Face Hub: ./run.sh export ... --push USER/NAME.

A repository is private unless its name is given a second time, with --public. The token comes from
the environment and is neither written nor shown. What is sent becomes one commit: it is there whole
or not at all. HF_ENDPOINT names another hub.
"""

import os
import re

from base import InputError, one_line

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
GUIDE = "https://huggingface.co/settings/tokens"


class Hub:
    """A repository that an export goes to. Raises InputError for what cannot work, before any of
    the work is done."""

    def __init__(self, args):
        self.name = args.push
        self.out = args.out
        self.licence = args.licence
        self.public = args.public is not None
        if args.to == "torchtitan":
            raise InputError("--push: is for --to hf and --to gguf, which others load from the Hub")
        if not self.name or self.public and args.public != self.name:
            raise InputError(
                f"--public {args.public}: expected the name of --push a second time, "
                f"{self.name or 'and --push itself'}; without --public it is private"
            )
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.name):
            raise InputError(f"--push {self.name}: expected USER/NAME, as in the Hub's addresses")
        token = next((os.environ[t] for t in TOKENS if os.environ.get(t)), None)
        if not token:
            raise InputError(
                f"--push {self.name}: no token in the environment; put one that may write in "
                f"{TOKENS[0]}, from {GUIDE}"
            )
        from huggingface_hub import HfApi

        self.token = token
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
        self.ask_for_rights()

    def refuse(self, why):
        # Whatever an error says, the token is no part of it
        why = one_line(why).replace(self.token, "***")
        raise InputError(f"--push {self.name}: {why[:300]}") from None

    def ask(self, what, function, *args, **kwargs):
        """function(...), its errors as InputError."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return function(*args, **kwargs)
        except HfHubHTTPError as e:
            status = getattr(e.response, "status_code", None)
            if status in (401, 403):
                self.refuse(
                    f"the Hub says that this token may not {what} ({status}); expected one with "
                    f"the right to write there, from {GUIDE}"
                )
            self.refuse(f"the Hub could not {what}: {e}")
        except Exception as e:  # of the network, in as many kinds as there are libraries below
            self.refuse(f"the Hub could not {what}: {type(e).__name__}: {e}")

    def ask_for_rights(self):
        """Raises InputError where the token is not one of somebody who may write there, or what is
        there is not as private as was asked for."""
        from huggingface_hub.errors import RepositoryNotFoundError

        who = self.ask("tell who it is of", self.api.whoami)
        owner = self.name.split("/")[0]
        owners = [who.get("name"), *(org.get("name") for org in who.get("orgs") or [])]
        if owner not in owners:
            self.refuse(f"the token is of {', '.join(filter(None, owners))}, not of {owner}")
        token = (who.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            self.refuse(f"the token may only read; make one that may write: {GUIDE}")
        try:
            found = self.api.repo_info(self.name)
        except RepositoryNotFoundError:
            return
        except Exception as e:
            self.refuse(f"the Hub could not tell whether it is there: {type(e).__name__}: {e}")
        if not found.private and not self.public:
            self.refuse("is there and public; give its name again with --public, or another name")
        if found.private and self.public:
            self.refuse("is there and private; make it public on the Hub, or leave --public out")

    def push(self, exported):
        """Send what has been written. Returns the address; raises InputError, and then the folder
        or file is still there."""
        from huggingface_hub import CommitOperationAdd

        from .card import model_card

        def operation(name, content):
            return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)

        if self.out.is_dir():
            files = sorted(path for path in self.out.iterdir() if path.is_file())
            operations = [operation(path.name, str(path)) for path in files]
        else:
            card = model_card(exported, exported.config, self.licence, gguf=self.out.name)
            operations = [
                operation(self.out.name, str(self.out)),
                operation("README.md", card.encode()),
            ]
        self.ask(
            "make the repository",
            self.api.create_repo,
            self.name,
            private=not self.public,
            exist_ok=True,
        )
        found = self.ask("tell whether it is private", self.api.repo_info, self.name)
        if not found.private and not self.public:  # as somebody's settings may have it
            self.refuse("has been made public by the Hub, so nothing was sent")
        self.ask(
            "take the files",
            self.api.create_commit,
            self.name,
            operations,
            commit_message=f"Weights after step {exported.model.step}",
        )
        return f"{self.api.endpoint}/{self.name}"
