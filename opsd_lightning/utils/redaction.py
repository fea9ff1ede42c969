"""Redact secrets in settings, command lines and messages: keys, tokens and passwords become ``***``.

A value is a secret if its setting has a telling name (``api_key``, ``dbPassword``), if it has a known form (``hf_...``, a
password in a URL), or if an environment variable with such a name holds it. Other secrets, such as a password in the middle
of a sentence, are not found.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

HIDDEN = "***"

# -- names -------------------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_A-Za-z]+")
# End of a secret's name, including words that are joined (PGPASSWORD).
_LAST = re.compile(
    r"(?:passwords?|passwds?|passphrases?|passcodes?|passwort|kennwort|contraseña|senha|пароль|密码|密碼|パスワード"
    r"|secrets?|credentials?|authorization|(?:web)?hooks?(?<=webhooks)|webhook|jwt|dsn|sas|mnemonic|sess(?:ion)?id"
    r"|(?:api|secret|access|private|account|auth|signing)keys?"
    r"|(?:auth|access|identity|registry|refresh|session|api|bearer|id|bot|user|secret)token)$"
)
_COOKIES = {"cookie", "cookies"}
_WORDS_OF_SECRETS = {*_COOKIES, "auth", "pw", "otp", "totp", "bearer"}
# For an ambiguous last word, the words before it that make the name a secret's.
_PAIRS: dict[str, Set[str]] = {
    "key": set(
        "api access secret private signing encryption account storage shared master subscription license deploy ssh service "
        "client auth app admin ingestion instrumentation server webhook hmac session security consumer token function sas "
        "kaggle wandb comet openai anthropic azure google gemini neptune hf huggingface mistral cohere groq together "
        "deepseek replicate pinecone algolia stripe sendgrid twilio mailgun datadog dd cosmos "
        "fernet aes rsa pgp gpg psk wifi wireguard django flask crypto cipher encrypt decrypt decryption".split()
    ),
    "pass": set(
        "db user smtp mail email ftp ldap admin root http proxy redis mysql pg postgres sudo rabbitmq mqtt sql database "
        "login imap basic".split()
    ),
    "tokens": set("api access auth bearer refresh secret hub bot session security hf github gitlab slack".split()),
    "pat": set("github gitlab azure devops ado bitbucket".split()),
    "signature": set("amz access goog".split()),
    "code": set("recovery backup auth authorization".split()),
    "string": {"connection", "conn"},
    "str": {"connection", "conn"},
    "url": {"webhook", "hook", "sas"},
    "uri": {"webhook", "hook", "sas"},
    "phrase": {"seed"},
}
# Words before "token" that mean a token of the vocabulary, which is not a secret.
_VOCABULARY = set(
    "pad eos bos unk sep cls mask stop think thinking image audio video boi eoi eot eom end start begin open close special "
    "sampled first last next new prev previous extra additional tool response answer question turn prompt completion per "
    "each single a the any every one this that of message system assistant vision object row col newline word sub soft "
    "draft bonus accepted target label ignore blank control chat im header call calls fim middle prefix suffix file repo "
    "text input output max min total mean likeliest student teacher".split()
)
# Words before "token" that always mean a secret.
_SECRET_TOKEN_WORDS = (
    _PAIRS["key"]
    | _PAIRS["tokens"]
    | set(
        "identity registry id user key my csrf xsrf oauth jwt push device vault personal pat ci npm pypi telegram "
        "discord otp mfa totp reset verification invite login password db root email job gitea jira circleci sonar".split()
    )
)
_HEADERS = {"header", "headers", "env", "environment", "environ", "cookies"}


@functools.lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Return True if a setting of this name holds a secret."""
    words = [word.lower() for word in _WORDS.findall(name[-200:])]
    while words and words[-1].isdigit():
        words.pop()
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if len(words) > 2 and last in ("id", "data") and before == "key":  # access_key_id, client_key_data
        last, before = before, words[-3]
    if last == "token":
        return before not in _VOCABULARY
    if last == "pwd":  # without another word: the current folder
        return before not in ("", "old", "current", "cur")
    if last in _WORDS_OF_SECRETS or name in ("pass", "Pass", "PASS") or _LAST.search(last):
        return True
    return before in _PAIRS.get(last, ()) or before in _PAIRS.get(last.removesuffix("s"), ())


def _may_be_vocabulary_token(name: str) -> bool:
    """Return True if a name ends with the word "token", and so may mean a token of the vocabulary."""
    return _WORDS.findall(name)[-1:] in (["token"], ["Token"], ["TOKEN"])


def _is_harmless(value: str, name: str = "") -> bool:
    """Return True for a harmless value under a secret's name: empty, a type, a placeholder or a control token."""
    if not value or value == HIDDEN or _PLACEHOLDER.fullmatch(value):
        return True
    if not _may_be_vocabulary_token(name):
        return False
    if _CONTROL.fullmatch(value):
        return True
    own = name.rpartition(".")[2]
    words = _WORDS.findall(own)
    if len(words) < 2 or own.isupper() or words[-2].lower() in _SECRET_TOKEN_WORDS:
        return False
    return len(value) < 6 or bool(_WORD.fullmatch(value))


_PLACEHOLDER = re.compile(
    r"(?i:null|none|true|false|required|optional|missing|str|int|bool|bytes|secretstr|<class '\w+'>|<[a-z _\-.]+>|~)"
    r"|Optional\[\w+\]|\*+|\$\w+|\$\{[^}]*\}|\$\{\{[^}]*\}\}|%s|%\(\w+\)s|\{\w*\}|\.\.\.|\u2026"
)
# Lower-case words, such as a choice of an option or a language, and token ids.
_WORD = re.compile(
    r"(?!.{41})(?:[a-z]{1,14}(?:[_\- ][a-z]{1,14}){0,4}(?:[=:]\d{1,5})?[.!,]*|[a-z]{2,3}[_\-][A-Z][A-Za-z]{1,3}|\d{1,6})"
)
_CONTROL = re.compile(r"[<\[|(].*[>\])|]", re.DOTALL)

# -- settings ----------------------------------------------------------------------------------------------------------

# Last words of settings that hold prose or patterns. A text such as "Secret:" in them does not announce a secret.
_PROSE = set("prompt prompts system template templates pattern patterns regex regexes instruction instructions".split())


def _is_prose(name: str) -> bool:
    return any(word.lower() in _PROSE for word in _WORDS.findall(name[-200:])[-1:])


def redact(value: Any, name: str = "", whole: bool = False) -> Any:
    """Return a copy of nested settings without secrets.

    Mappings, namespaces and dataclasses become dictionaries, and other collections become lists. Every value below a
    secret's name is hidden. In prompts, templates and patterns, only known forms and values from the environment are hidden.

    Args:
        value: Collections and plain values.
        name: Name of the setting.
        whole: If True, hide a text as a whole if it contains a secret, so that no run can start with the incomplete text.
    """
    return _redact(value, name, bool(name) and is_secret(name), _is_prose(name), whole, 0)


def _redact(value: Any, name: str, hide: bool, prose: bool, whole: bool, depth: int) -> Any:
    if depth > 100:
        return HIDDEN
    if isinstance(value, Namespace):
        value = vars(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        value = dict(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        return _redact_mapping(value, name, hide, prose, whole, depth)
    if isinstance(value, (list, tuple, Set)):
        return _redact_list(list(value), name, hide, prose, whole, depth)
    if hasattr(value, "get_secret_value"):
        return HIDDEN
    if isinstance(value, (bytes, bytearray)):
        text = bytes(value).decode("utf-8", "surrogateescape")
        return _redact(text, name, hide, prose, whole, depth).encode("utf-8", "surrogateescape")
    if isinstance(value, PurePath):
        text = _redact(str(value), name, hide, prose, whole, depth)
        return value if text == str(value) else text
    if hide and value is not None and not isinstance(value, bool):
        text = str(value)
        number = isinstance(value, (int, float)) and _may_be_vocabulary_token(name) and len(text) < 6
        return value if number or _is_harmless(text, name) else HIDDEN
    if not isinstance(value, str):
        return value
    text = _redact_forms(value) if prose else redact_text(value)
    return HIDDEN if whole and text != value else text


_USERS = {"user", "username", "user_name", "user id", "userid", "uid", "login", "account", "email"}
# A value of `pwd` that is a folder.
_FOLDER = re.compile(r"\\*[\"']?(?:[~./$`]|[A-Za-z]:[\\/]|-P\b|$)")


def _redact_mapping(value: Mapping[Any, Any], name: str, hide: bool, prose: bool, whole: bool, depth: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    # [{name: API_KEY, value: x}], as in container manifests
    named = value.get("name") or value.get("key")
    pair = isinstance(named, str) and is_secret(named)
    login = any(str(key).lower() in _USERS for key in value)
    for key, part in value.items():
        shown = redact_text(key) if isinstance(key, str) else key
        if whole and shown != key:
            shown = HIDDEN
        if hide and key == "class_path":
            found[shown] = part
            continue
        own = str(key)
        password = login and own.lower() == "pwd" and not _FOLDER.match(str(part))
        secret = is_secret(own) or password or (pair and own == "value")
        name_of_part = name if hide and not secret else own
        found[shown] = _redact(part, name_of_part, hide or secret, prose or _is_prose(own), whole, depth + 1)
    return found


def _redact_list(values: list[Any], name: str, hide: bool, prose: bool, whole: bool, depth: int) -> list[Any]:
    texts = bool(values) and all(isinstance(part, (str, bytes)) for part in values)
    if texts and not hide and not prose:
        plain = [part.decode("utf-8", "replace") if isinstance(part, bytes) else part for part in values]
        if len(plain) == 2 and is_secret(plain[0]) and _names_next_text(plain[0], name):
            return [values[0], _redact(values[1], plain[0], True, prose, whole, depth + 1)]
        if any(part.startswith("-") or _PROGRAM.fullmatch(part) for part in plain):
            found = redact_arguments(plain)
            return [HIDDEN if whole and text != part else text for text, part in zip(found, plain, strict=True)]
    return [_redact(part, name, hide, prose, whole, depth + 1) for part in values]


def _names_next_text(first: str, name: str) -> bool:
    """Return True if the first of two texts names the second, as in a header, and not a column or a tag."""
    if re.search(r"\s", first):
        return False
    above = _WORDS.findall(name[-200:])[-1:]
    known = "-" in first or first.lower() in ("authorization", "cookie")
    return known or any(word.lower() in _HEADERS for word in above)


def hidden_names(value: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of settings with a hidden value or a hidden key."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, part in value.items():
            own = f"{name}.{key}" if name else str(key)
            if key == HIDDEN:
                yield own
            else:
                yield from hidden_names(part, own)
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from hidden_names(part, f"{name}.{place}")
    elif isinstance(value, str) and value == HIDDEN:
        yield name


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments without secrets, in the forms ``--api_key X`` and ``--api_key=X``."""
    found: list[str] = []
    hides, prose = "", False  # name of the secret that the next argument holds; the next argument is prose
    for argument in _redact_programs(arguments):
        name, _, value = argument.partition("=")
        option = name.startswith("-")
        if hides and not option:
            found.append(argument if _is_harmless(argument, hides) else HIDDEN)
        elif option and value and is_secret(name):
            found.append(argument if _is_harmless(value, name) else f"{name}={HIDDEN}")
        elif option and value:
            found.append(f"{name}={_redact_forms(value) if _is_prose(name) else redact_text(value)}")
        elif prose and not option:
            found.append(_redact_forms(argument))
        else:
            found.append(redact_text(argument))
        prose = option and not value and _is_prose(name)
        hides = name if option and not value and is_secret(name) else ""
    return found


def _redact_programs(arguments: Sequence[str]) -> list[str]:
    """Hide passwords in the options of known programs: ``["curl", "-u", "bob:X"]``."""
    if not any(_PROGRAM.fullmatch(argument) for argument in arguments):
        return list(arguments)
    line = shlex.join([argument.rpartition("/")[2] if _PROGRAM.fullmatch(argument) else argument for argument in arguments])
    parts = shlex.split(_WANDB.sub(rf"\1{HIDDEN}", _CLIENT.sub(_redact_client_options, line)))
    if len(parts) != len(arguments):
        return list(arguments)
    return [
        part if HIDDEN in part and HIDDEN not in argument else argument
        for part, argument in zip(parts, arguments, strict=True)
    ]


# -- texts -------------------------------------------------------------------------------------------------------------

_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-(?:(?:proj|ant|or|svcacct|admin|lf)-(?=[\w\-]{0,60}?\d)(?:(?=[\w\-]{0,60}?\w{16})|(?=[\w\-]{0,60}?[A-Z]))[\w\-]{16,}"
    r"|(?=\w{0,30}?\d)(?:[A-Za-z0-9]{24,}|(?=\w{0,20}?[A-Z])\w{16,})[\w\-]*)"
    r"|sess-[A-Za-z0-9]{20,}|gsk_[A-Za-z0-9]{20,}|xai-[A-Za-z0-9]{20,}|pplx-[A-Za-z0-9]{20,}"
    r"|r8_[A-Za-z0-9]{20,}|nvapi-[\w\-]{20,}|fw_[A-Za-z0-9]{20,}|tgp_v\d_[\w\-]{20,}|csk-[A-Za-z0-9]{20,}"  # models
    r"|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|gl(?:pat|dt|rt|cbt|ptt|soat|ft|imt|agent)-[\w\-.]{16,}"
    r"|(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}|AIza[\w\-]{30,}|ya29\.[\w\-]{10,}|1//0[\w\-]{20,}|GOCSPX-[\w\-]{16,}"
    r"|LTAI[A-Za-z0-9]{12,}|[\w~.]{3}\dQ~[\w~.\-]{30,}"  # Alibaba, Azure AD
    r"|xox[abeprs](?:\.xox[abeprs])?-[\w\-]{10,}|xapp-[\w\-]{10,}|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[\w+/=]{16,}"
    r"|npm_[A-Za-z0-9]{20,}|pypi-[\w\-]{16,}|rubygems_[0-9a-f]{20,}|dckr_(?:pat|oat)_[\w\-]{16,}|oy2[a-z0-9]{43}"
    r"|SG\.[\w\-]{16,}\.[\w\-]{16,}|SK[0-9a-f]{32}|key-[0-9a-f]{32}|[0-9a-f]{32}-us\d{1,2}|xkeysib-[\w\-]{20,}"
    r"|\d{8,10}:[A-Za-z0-9_\-]{35}|(?:bot)?\d{8,10}:AA[\w\-]{30,}|[MNO][\w\-]{23,27}\.[\w\-]{6}\.[\w\-]{27,}"  # chat bots
    r"|dapi[0-9a-f]{32}(?:-\d)?|do[opr]_v1_[0-9a-f]{32,}|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{20,}|sq0(?:atp|csp)-[\w\-]{20,}"
    r"|NRAK-[A-Z0-9]{20,}|NRII-[\w\-]{20,}|lin_api_\w{20,}|ntn_\w{20,}|secret_[A-Za-z0-9]{40,}|figd_[\w\-]{20,}"
    r"|PMAK-[\w\-]{20,}|hv[sbr]\.[\w\-]{16,}|\w{14}\.atlasv1\.[\w\-]{30,}|gl(?:c|sa)_[\w+/=]{20,}|pscale_\w+_[\w.\-]{20,}"
    r"|CFPAT-[\w\-]{20,}|ATATT3x[\w\-=]{20,}|ATBB[A-Za-z0-9]{20,}|ATCTT3x[\w\-=]{20,}|sgp_[\w]{20,}|pat[A-Za-z0-9]{14}\.[0-9a-f]{32,}"
    r"|wandb_v\d_\w{20,}|eyJhcGlf[\w+/\-]{20,}={0,2}"  # W&B, Neptune
    r"|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]*|eyJ[\w\-]{10,}\.[\w\-]*\.[\w\-]*\.[\w\-]*\.[\w\-]*"  # JWT, JWE
    r"|AGE-SECRET-KEY-1[0-9A-Z]{20,}|(?:EAA|IGQ)[A-Za-z0-9]{40,}|AAAA[A-Za-z0-9_\-]{7}:[\w\-]{100,}"
    r")"
)
_PEM = re.compile(
    r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----(?!\*)"
    r"(?:(?!-----END )[\w+/=\s\\:;,.()\-]|[\"'|>])*+(?:-----END \1-----)?"
)
_SCHEME = re.compile(r"(?i)(?<![\w\-])(bearer|basic|token|negotiate|apikey|api-key)(\\?[ \t]+|%20|\+)([\w\-.~+/=:|%]{6,}+)")
_DIGEST = re.compile(r"(?i)\b(digest|hawk|oauth|aws4-hmac-sha256|signature)([ \t]+)(?=[\w\-]+=)([^\n]+)")
_WEB_HOOK = re.compile(
    r"(?i)((?:hooks\.slack\.com/(?:services|workflows|triggers)|discord(?:app)?\.com/api/webhooks|hooks\.zapier\.com/hooks"
    r"|(?:[\w\-]+\.)?webhook\.office(?:365)?\.com|outlook\.office(?:365)?\.com/webhook|[\w.\-]*/(?:web-?)?hooks?(?:s?/catch)?"
    r"|maker\.ifttt\.com/trigger/\w+/(?:json/)?with/key|open\.feishu\.cn/open-apis/bot/v2/hook"
    r"|(?:[\w\-]+\.)?pipedream\.net|api\.telegram\.org))/([^\s\"'<>\\?#]+)"
)
_QUERY = re.compile(
    r"(?i)([?&;]|%26|%3F)(sig|signature|key|code|auth|hmac|x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)"
    r"|googleaccessid|policy|assertion|ticket|pw|pass|sid|session|sessionid|sv?token|secret|salt|otp)(=|%3D)([^&\s\"'<>\\]{5,})"
)
_URL = re.compile(r"(?<![A-Za-z0-9+.\-])([A-Za-z][A-Za-z0-9+.\-]*+)(:(?:\\?/){2})([^\s\"'<>`]+)")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s/?#@:,\\]+)(?::\d+)?(?=[/?#,;)\]}.]|$)|(?=/)")
_ENCODED_URL = re.compile(r"(?i)(%3A(?:%2F){2})((?:(?!%40|%2F)[\w.~%\-]){1,200}+)(%40)")
_ORACLE = re.compile(r"(?i)(jdbc:oracle:\w{1,20}:)[^\s/]{1,200}/[^\s@]{1,200}(?=@)")
_USER_IN_LIST = re.compile(r"([\"']--?(?:u|user|proxy-user)[\"'],[ \t]*[\"'][^\"'\s:]{0,100}:)([^\"'\n]{1,200})")
_USER_CLIENT = re.compile(r"(?<![\w.\-])(?:curl|wget|https?)[\"']")
# A pair of strings, the first naming the second: a header, or the arguments of a call.
_PAIR = re.compile(r"(\b\w{1,40})?([(\[][ \t]*)[bru]?([\"'])([\w.\-]{3,100})\3,[ \t]*(?=[bBrRuUf]?[\"'])")
_SETS = re.compile(
    r"(?i)(?:set|put|get)_?(?:env|default|item|header|requestheader|secret|property)?|add_?header|header|append|add"
)
_XML = re.compile(r"<([\w.:\-]{1,100})(?:\s[^<>]{0,200})?>([^<>]{1,10000})</\1>")
_ENTRY = re.compile(
    r"(?i)((?<![\w.\-])[\"']?(?:name|key)[\"']?[ \t]*[:=][ \t]*([\"']?)([\w.\-]{3,100})\2(?:[,;]?\s{1,40}|,)"
    r"[\"']?value[\"']?[ \t]*[:=][ \t]*)"
    r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'][^\s,;}]*)"
)
_NETRC = re.compile(r"(?i)(\blogin\s+\S+\s+(?:account\s+\S+\s+)?password\s+)(\S+)")
_CLIENT = re.compile(
    r"(?<![\w./\-])(curl|wget|https?|sshpass|mysql\w*|mariadb|mongo\w*|redis-cli|docker|podman|smbclient|ldap\w+)\b"
    r"(?=[ \t])([^\n|;]+)"
)
_PROGRAM = re.compile(
    r"(?:[\w./\-]{0,200}/)?(?:curl|wget|https?|sshpass|mysql\w*|mariadb|mongo\w*|redis-cli|docker|podman|smbclient|ldap\w+"
    r"|wandb)"
)
_WANDB = re.compile(r"(\bwandb\b[ \t.,\"']{1,9}login\b[^\n]{0,80}?(?<![A-Za-z0-9]))[A-Za-z0-9_]{40,100}(?![A-Za-z0-9])")
_CLIENT_OPTION = re.compile(
    r"([ \t](?:--?|-[sSkLfgivG]{1,6}(?=u))(u|user|proxy-user|U|p|a|w)(?:[ \t]+|=|(?<=-p)|(?<=[ \t]-u)))"
    r"(\"[^\"]*\"|'[^']*'|[^\s\"'\-][^\s\"']*)"
)
_OPTION = re.compile(
    r"(?<![\w\-])(--?[A-Za-z][\w.\-]*+)([ \t]+|\\?[\"'],[ \t]*(?=\\?[\"']))(?!-)"
    r"(\\?\"[^\"\n]*\"|\\?'[^'\n]*'|\$'[^'\n]*'|[^\s\"']\S*)"
)
_AFTER_OPTION = {
    *"is to or and for with was must needs requires option flag cannot has not argument if are can without".split()
}
_NAMED = re.compile(
    r"(?<![\w.\-])([\w.\-]++)((?:\\*[\"'`]|\\*[\"']?\])?[ \t]*(?:=>|:=|={1,2}|:(?!//)|%3D|%3A(?!%2F))[ \t]*)"
)
_ANNOTATION = re.compile(r"(?:str|bytes|SecretStr|Optional\[str\]|str \| None)[ \t]*=[ \t]*")
_QUOTED = re.compile(r"[bBrRuUfF$]{0,2}(?:\"\"\"(?s:.*?)\"\"\"|'''(?s:.*?)'''|\"(?:[^\"\\]|\\.)*+\"|'(?:[^'\\]|\\.|'')*+')")
_ESCAPED = re.compile(r"(\\+[\"'])(?:(?!\1)[^\n])*+(?:\1)?")
_OPEN_QUOTE = re.compile(r"[bBrRuU]{0,2}[\"'][^\n]*")
_CALL = re.compile(r"[A-Za-z_][\w.]*(?=[(\[])")
_PLAIN = re.compile(
    r"(?:(?!,(?:\s|$|[\"']|[\w.\-]+[\"']?[ \t]*[:=]))(?!;(?:\s|$|[\w .\-]+=))(?!(?:&|%26)[\w.\-]+(?:=|%3D))"
    r"(?![)\]}]+(?:$|[\s,;:.)\]}\"']))[^\s\"'<>`]|(?<=\w)['\"](?=\w))++"
)
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}\n]*\}|\{\{[^}\n]*\}\})(?![^\s,;&)\]}\"'])")
# Arithmetic, such as x + 5.
_SUM = re.compile(r"[\w.]{1,5}[ \t]+[+*/^=\u00d7\u00b7\u2212\-][ \t]+\(?(?:\d|[a-z]\b)")
_COOKIE = re.compile(r"[^\s;\"']+(?:;[ \t]*[^\s;\"']+)*+;?")
_BLOCK = re.compile(r"(?<![\w.\-])([\w.\-]++)[\"']?[ \t]*:[ \t]*([|>][+\-\d]*)?[ \t\r]*$")


def redact_text(text: str) -> str:
    """Return a text without secrets that have a known form, follow a secret's name, or are in the environment."""
    if not text:
        return text
    text = _redact_forms(text)
    if "%3A" in text or "%3a" in text:
        text = _ENCODED_URL.sub(rf"\1{HIDDEN}\3", text)
    text = _ORACLE.sub(rf"\1{HIDDEN}", text)
    text = _QUERY.sub(_redact_query, text)
    if "\n" in text and ":" in text:
        text = _redact_yaml_blocks(text)
    text = _redact_named(text)
    text = _XML.sub(_redact_xml, _ENTRY.sub(_redact_entry, _redact_pairs(text)))
    text = _DIGEST.sub(rf"\1\2{HIDDEN}", _SCHEME.sub(_redact_scheme, text))
    text = _OPTION.sub(_redact_option, text)
    text = _WANDB.sub(rf"\1{HIDDEN}", _CLIENT.sub(_redact_client_options, text))
    text = _USER_IN_LIST.sub(_redact_user_in_list, text)
    return _NETRC.sub(lambda found: found[1] + (found[2] if _is_harmless(found[2]) else HIDDEN), text)


def _redact_forms(text: str) -> str:
    """Return a text without secrets of the environment, keys of a known form and passwords in URLs."""
    for value, pattern in _environment_secrets():
        if value in text:
            text = pattern.sub(HIDDEN, text)
    if "PRIVATE KEY" in text:
        text = _PEM.sub(rf"-----BEGIN \1-----{HIDDEN}", text)
    text = _FORMS.sub(HIDDEN, text)
    return _URL.sub(_redact_url, text) if "://" in text or ":\\/" in text else text


_known: tuple[dict[str, str], list[tuple[str, re.Pattern[str]]]] = ({}, [])


def _environment_secrets() -> list[tuple[str, re.Pattern[str]]]:
    """Return the secrets in environment variables with a pattern for each of their spellings, longest first."""
    global _known
    held = {name: value for name, value in os.environ.items() if is_secret(name) and _is_distinctive(value)}
    if held != _known[0]:
        forms: dict[str, re.Pattern[str]] = {}
        for value in held.values():
            quoted = {value, value.strip(), quote(value), quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
            for form in quoted:
                # A short value may also occur inside an ordinary word.
                edge = len(value) < 16
                around = (r"(?<![^\W_])", r"(?![^\W_])") if edge else ("", "")
                forms[form] = re.compile(around[0] + re.escape(form) + around[1])
        _known = held, sorted(forms.items(), key=lambda item: -len(item[0]))
    return _known[1]


def _is_distinctive(value: str) -> bool:
    """Return True for a value to search for. Common words, short numbers and paths also occur in harmless texts."""
    value = value.strip()
    kinds = sum(bool(re.search(kind, value)) for kind in (r"[a-z]", r"[A-Z]", r"\d", r"[^\w\s]|_", r"[^\W\d_a-zA-Z]"))
    if len(value) < (6 if kinds > 1 else 8) or is_secret(value) or _is_harmless(value):
        return False
    if re.match(r"(?:~|\.{1,2})?/|[A-Za-z]:\\", value) and re.fullmatch(r"[\w./~\\: \-]+", value):
        return not (os.path.exists(os.path.expanduser(value)) or re.fullmatch(r"(?:[~.]{0,2}/[\w.\- ]*){2,}", value))
    return True


def _redact_url(found: re.Match[str]) -> str:
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    end = min((place for sign in "/?#" if (place := rest.find(sign)) >= 0), default=len(rest))
    authority = rest[:end]
    name, colon, behind = authority.partition(":")
    at = -1
    web = re.search(r"(?:^|\+)(?:https?|wss?|ftp)$", scheme) is not None
    if colon and not (re.fullmatch(r"\d+", behind) and (web or not name)):  # user:password, with any characters
        places = [place for place, sign in enumerate(rest[:2000]) if sign == "@"]
        ends = [place for place in places if _HOST.match(rest, place + 1)]
        within = [place for place in ends if place < end]
        # The password ends at the last @ that a host follows. The path after a complete host may contain @ as well.
        at = within[-1] if within and web else ends[-1] if ends else -1
        if within and web and (later := [place for place in ends if place > end]):
            host = rest[within[-1] + 1 : end]
            if not _HOST.match(rest, within[-1] + 1) or ("." not in host and "localhost" not in authority):
                at = later[-1]
    elif "@" in authority:
        user = authority.rpartition("@")[0]
        if scheme.rpartition("+")[2] in ("ssh", "git", "sftp", "scp") and re.fullmatch(r"[a-z][a-z0-9_\-]{0,31}", user):
            return _redact_web_hook(found[0])
        at = authority.rindex("@")
    if at >= 0:
        rest = HIDDEN + rest[at:]
    return _redact_web_hook(found[1] + slashes + rest)


def _redact_web_hook(url: str) -> str:
    def hide(found: re.Match[str]) -> str:
        known = re.search(r"(?i)slack|discord|zapier|office|ifttt|feishu|telegram|pipedream", found[1])
        telling = re.search(r"[\w\-]{16,}", found[2]) or (
            re.search(r"\d", found[2]) and re.search(r"[A-Za-z]", found[2]) and len(found[2]) >= 8
        )
        return f"{found[1]}/{HIDDEN}" if known or telling else found[0]

    return _WEB_HOOK.sub(hide, url)


def _redact_query(found: re.Match[str]) -> str:
    return found[0] if _is_harmless(found[4]) else f"{found[1]}{found[2]}{found[3]}{HIDDEN}"


def _redact_scheme(found: re.Match[str]) -> str:
    value = found[3].rstrip(".:")
    # An ordinary word in a sentence about tokens has no digits, is short or has a single case.
    random = re.search(r"\d|[+/=~|]", value) or (value.lower() != value and not value.istitle()) or len(value) >= 24
    if found[1].lower() in ("token", "basic", "apikey", "api-key"):
        random = random and (len(value) >= 12 or "=" in value) and not re.fullmatch(r"[\w]+[=:].*", value)
    return f"{found[1]}{found[2]}{HIDDEN}{found[3][len(value) :]}" if random and not _is_harmless(value) else found[0]


def _redact_option(found: re.Match[str]) -> str:
    name, between, value = found.groups()
    bare = value.strip("\\\"'$")
    if not is_secret(name) or _is_harmless(bare, name) or bare in _AFTER_OPTION or value.startswith(HIDDEN):
        return found[0]
    return f"{name}{between}{_hidden_in_quotes(value)}"


def _redact_client_options(found: re.Match[str]) -> str:
    """Hide the password in the options of a known program."""
    program, rest = found.groups()
    alone = {"p": ("sshpass", "mysql", "mariadb", "mongo", "docker", "podman"), "a": ("redis",), "w": ("ldap",)}

    def hide(option: re.Match[str]) -> str:
        before, name, value = option.groups()
        if name in alone:
            spaced = before[-1] in " \t="
            other = (program.startswith(("docker", "podman")) and " login" not in rest) or (
                program.startswith(("mysql", "maria")) and spaced
            )
            return before + _hidden_in_quotes(value) if program.startswith(alone[name]) and not other else option[0]
        sign = "%" if program == "smbclient" else ":"
        user, colon, password = value.partition(sign)
        takes = program in ("curl", "wget", "http", "https", "smbclient")
        tail = value[-1] if value[-1] in "\"'" else ""
        return (
            f"{before}{user}{sign}{HIDDEN}{tail}"
            if takes and colon and not _is_harmless(password.strip("\"'"))
            else option[0]
        )

    return program + _CLIENT_OPTION.sub(hide, rest)


def _redact_user_in_list(found: re.Match[str]) -> str:
    near = found.string[max(found.start() - 300, 0) : found.start()]
    return found[1] + HIDDEN if _USER_CLIENT.search(near) and not _is_harmless(found[2]) else found[0]


def _redact_pairs(text: str) -> str:
    """Hide the second string of a pair in brackets: ``("X-Api-Key", "x")``, ``setenv("API_KEY", "x")``."""
    pieces: list[str] = []
    done = place = 0
    while (match := _PAIR.search(text, place)) is not None:
        place = match.end()
        call, bracket, name = match[1] or "", match[2], match[4]
        sets = bracket.startswith("(") and _SETS.fullmatch(call)
        if not is_secret(name) or not (sets or _names_next_text(name, "")):
            continue
        quoted = _QUOTED.match(text, place)
        value = quoted[0].strip("bBrRuUf\"'") if quoted else ""
        # Two plain words may be two column names.
        if (
            quoted is None
            or _is_harmless(value, name)
            or (not name.isupper() and sets and "-" not in name and value.isalpha())
        ):
            continue
        pieces += [text[done:place], _hidden_in_quotes(quoted[0])]
        done = place = quoted.end()
    return "".join([*pieces, text[done:]])


def _redact_xml(found: re.Match[str]) -> str:
    name, value = found[1].rpartition(":")[2], found[2].strip()
    words = re.fullmatch(r"[a-z]+(?:\s+\w+)*", value) and _may_be_vocabulary_token(name)
    if not is_secret(name) or words or _is_harmless(value, name) or re.fullmatch(r"-?[\d.]{1,5}", value):
        return found[0]
    start, end = found.start(2) - found.start(), found.end(2) - found.start()
    return f"{found[0][:start]}{HIDDEN}{found[0][end:]}"


def _redact_entry(found: re.Match[str]) -> str:
    bare = found[4].strip("\"'")
    if not is_secret(found[3]) or _is_harmless(bare, found[3]):
        return found[0]
    return found[1] + _hidden_in_quotes(found[4])


def _hidden_in_quotes(value: str) -> str:
    """Return ``***`` with the quotes of a value around it."""
    quotes = re.match(r"[bBrRuUfF$]{0,2}(\\*(?:\"\"\"|'''|[\"']))", value)
    if quotes is None:
        return HIDDEN
    closed = len(value) >= 2 * len(quotes[1]) and value.endswith(quotes[1])
    return f"{quotes[0]}{HIDDEN}{quotes[1] if closed else ''}"


def _redact_yaml_blocks(text: str) -> str:
    """Hide the indented block below a secret's name, as in YAML."""
    found: list[str] = []
    below: int | None = None  # indentation of the secret's name
    listed = False
    for line in text.split("\n"):
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if below is not None:
            if not bare or indent > below or (listed and indent == below and bare.startswith("- ")):
                if bare and found[-1].strip() != HIDDEN:
                    found.append(" " * (below + 2) + HIDDEN)
                continue
            below = None
        match = _BLOCK.search(line, max(len(line) - 300, 0))
        if match is not None and is_secret(match[1]):
            before = line[: match.start()].strip("\"' \t-")
            if not before or match[2] or not _may_be_vocabulary_token(match[1]):  # otherwise a sentence about a token
                own = re.match(r"[ \t]*(?:-[ \t]+)*", line)
                below, listed = len(own[0]) if own else 0, not match[2]
        found.append(line)
    return "\n".join(found)


def _redact_named(text: str) -> str:
    """Hide values after a secret's name: ``api_key=x``, ``{"api_key": "x"}``, ``Authorization: Bearer x``."""
    pieces: list[str] = []
    done = place = 0
    while (match := _NAMED.search(text, place)) is not None:
        place = match.end()
        name = match[1]
        if not (_is_secret_in_context(text, match) or is_secret(name)) or (
            name.lower() in ("authorization", "auth") and "==" in match[2]
        ):
            continue
        if annotation := _ANNOTATION.match(text, place):
            place = annotation.end()
        hidden, end = _redact_value(text, place, match)
        if end > place:
            pieces += [text[done:place], hidden]
            done = place = end
    return "".join([*pieces, text[done:]])


def _is_secret_in_context(text: str, match: re.Match[str]) -> bool:
    """Return True if the surrounding text makes an ambiguous name a secret's: ``api key: x``, ``pwd=x``."""
    name, bare = match[1].lower(), match[2].strip() in (":", "=")
    if name == "pwd":
        return not _FOLDER.match(text, match.end())
    if name not in ("key", "keys", "pass", "phrase", "code", "string", "pat"):
        return False
    before = re.search(r"([A-Za-z]{2,20})[ \t]$", text[max(match.start() - 22, 0) : match.start()])
    if before is None or not is_secret(f"{before[1]}_{name}"):
        return False
    # A sentence may mention a key without giving one.
    return (
        not bare
        or re.compile(r"[\"']|(?=[^\s]{0,200}\d)(?=[^\s]{0,200}[A-Za-z])[^\s]{8}").match(text, match.end()) is not None
    )


def _redact_value(text: str, place: int, match: re.Match[str]) -> tuple[str, int]:
    """Return the replacement for the value at a place, and the index of its end. An unchanged value ends at the place."""
    name, sign = match[1], match[2]
    if text.startswith(HIDDEN, place):
        return "", place
    word = name in ("PASS", "Pass") or (name.lower() == "bearer" and not re.compile(r"\S{0,40}\d").match(text, place))
    if word and sign.strip() == ":":  # "PASS:" in a test report, or a word of a sentence
        return "", place
    for pattern in (_QUOTED, _ESCAPED):
        if quoted := pattern.match(text, place):
            inner = re.sub(r"^[bBrRuUfF$]{0,2}(\\*[\"'])+|(\\*[\"'])+$", "", quoted[0])
            return (quoted[0] if _is_harmless(inner, name) else _hidden_in_quotes(quoted[0])), quoted.end()
    if open_quote := _OPEN_QUOTE.match(text, place):  # cut off
        return _hidden_in_quotes(open_quote[0]), open_quote.end()
    if text[place : place + 1] in ("{", "[", "("):
        if _may_be_vocabulary_token(name) and re.compile(r"\[\w{1,40}\]").match(text, place):  # [MASK]
            return "", place
        end = _closing_bracket(text, place)
        if text[place] == "(" and re.fullmatch(r"\((?!.*\d{6})[\d\s+*/^.()\-]*\)", text[place : min(end, place + 100)]):
            return "", place
        return (HIDDEN if text[place + 1 : end - 1].strip() else text[place:end]), end
    if (call := _CALL.match(text, place)) is not None:
        end = call.end() + _closing_bracket(text[call.end() : call.end() + 500], 0)
        if re.search(r"[\"']", text[call.end() : end]) and not call[0].endswith(("environ", "getenv")):
            return f"{call[0]}{text[call.end()]}{HIDDEN}{text[end - 1]}", end
        return "", place
    before = text[match.start() - 1 : match.start()]
    enclosing = before if before in ("'", '"', "`") and sign[0] not in "\"'`\\" else ""
    kind = _WORDS.findall(name)[-1].lower()
    if kind in _COOKIES:
        return _redact_match(_COOKIE, text, place, enclosing)
    if kind == "authorization" or (enclosing and kind not in ("token",)):
        return _redact_header(text, place, enclosing)
    plain = _PLAIN.match(text, place)
    if plain is None or _VARIABLE.match(text, place):
        return "", place
    value, end = plain[0], plain.end()
    # Punctuation at the end belongs to the sentence.
    shown = value.rstrip(".,;:!?") if re.search(r"[.,;:!?]$", value) and ":" in sign else value
    if _is_harmless(shown, name) or _is_harmless(shown.rstrip(")]}"), name):
        return "", place
    structured = bool(enclosing) or sign[0] in "\"'`\\"
    if not structured and (re.fullmatch(r"-?\d{1,5}(?:\.\d{1,4})?%?", shown) or _SUM.match(text, place)):
        return "", place
    end -= len(value) - len(shown)
    line = text[end : end + 1000].partition("\n")[0]
    start = text.rfind("\n", max(match.start() - 100, 0), match.start()) + 1 or max(match.start() - 100, 0)
    if ":" in sign and re.fullmatch(r"[ \t]*(?:error: |-[ \t]+)*[\"']?", text[start : match.start()]):
        # A line of YAML, where an unquoted value may contain spaces.
        sentence = re.fullmatch(r"[a-z]+", shown) and re.match(r" [a-z(]", line)
        if sentence and ("." in name or kind in ("token", "tokens")):  # "setting: problem", a `ConfigError`
            return "", place
        if "." not in name and line.startswith((" ", ",")) and not re.search(r"[:=]", line):
            comment = re.search(r"[ \t]+#", line)
            return HIDDEN, end + (comment.start() if comment else len(line.rstrip()))
    elif kind == "token" and ":" in sign and re.fullmatch(r"[a-z]+", shown) and line[:1] in ("", " ") and sign[0] == ":":
        return "", place
    if "==" in sign:
        return "", place
    return HIDDEN, end


def _redact_match(pattern: re.Pattern[str], text: str, place: int, enclosing: str) -> tuple[str, int]:
    found = pattern.match(text, place)
    if found is None or _is_harmless(found[0]):
        return "", place
    if pattern is _COOKIE and not re.match(r"[\w\-.$%]*[A-Za-z_][\w\-.]*=|(?=\S*\d)(?=\S*[A-Za-z])\S{8}", found[0][:200]):
        return "", place  # prose about cookies
    end = found.end()
    if enclosing and (stop := text.find(enclosing, place)) >= 0:
        end = stop
    return HIDDEN, end


_AUTHORIZATION = re.compile(
    r"(?i)(?:(?:bearer|basic|token|negotiate|ntlm|apikey|api-key|key|bot|splunk|genie\w*)(?:[ \t]+|%20)[^\s\"',;]+"
    r"|[\w\-]+[ \t]+(?=[\w\-]+=)[^\n\"']*(?:\"[^\"\n]*\"[^\n\"]*)*+|[^\s\"',;]+)"
)


def _redact_header(text: str, place: int, enclosing: str) -> tuple[str, int]:
    if enclosing:
        stop = next((n for n in range(place, min(len(text), place + 10_000)) if text[n] in (enclosing, "\n")), len(text))
        return (text[place:stop] if _is_harmless(text[place:stop].strip()) else HIDDEN), stop
    return _redact_match(_AUTHORIZATION, text, place, "")


def _closing_bracket(text: str, place: int) -> int:
    """Return the index after the bracket that closes the one at a place, or the length of the text."""
    depth, quoted = 0, ""
    for n in range(place, len(text)):
        sign = text[n]
        if quoted:
            if sign == quoted and text[n - 1] != "\\":
                quoted = ""
        elif sign in "\"'" and text[n - 1 : n] in ("", *"([{,: =\n"):
            quoted = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if not depth:
                return n + 1
    return len(text)
