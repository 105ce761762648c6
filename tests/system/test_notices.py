from __future__ import annotations

import logging
import threading

from shoal.system.notices import notices_to


def test_what_is_logged_of_prompts_and_models_is_heard_as_long_as_it_lasts() -> None:
    heard: list[str] = []
    with notices_to(heard.append):
        logging.getLogger("shoal.requests.prompts").warning("of %s", "a prompt")
        logging.getLogger("shoal.text.chat").warning("of a template")
        logging.getLogger("shoal.text.chat").info("too little")
        logging.getLogger("other").warning("not ours")
        thread = threading.Thread(target=logging.getLogger("shoal.requests.prompts").warning, args=("another job's",))
        thread.start()
        thread.join()
    logging.getLogger("shoal.requests.prompts").warning("too late")
    assert heard == ["of a prompt", "of a template"]
