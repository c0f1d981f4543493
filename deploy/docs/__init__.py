"""What of the pages is made from other files, so that each fact has one place: `python -m deploy.docs` writes it anew, `--check` names what is old.

Settings come from the config models, errors from their classes and `errors.yaml`, commands from their own options, example configs from
their files, and numbers from the JSON that benches wrote. Needs neither torch nor ray.
"""
