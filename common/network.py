"""Whether a server answers at all, asked before a library that would try for half a minute."""

import ssl
import threading
import urllib.error
import urllib.request

WAIT = 3.0  # seconds


def why_unreachable(url: str, seconds: float = WAIT) -> str:
    """Return why no server answers at a URL within some seconds, "" if one does.

    An error status and a refused certificate are answers. Proxies of the environment are used.
    """
    answer = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answer[0] = ""
        except urllib.error.HTTPError:
            answer[0] = ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            answer[0] = "" if isinstance(reason, ssl.SSLError) else str(reason)

    # A thread, since looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]
