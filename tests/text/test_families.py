"""Templates as the model families write them: the constructs that each relies on, and the prompt that must come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from shoal.errors import TemplateError
from shoal.text.chat import ChatTemplate
from shoal.text.sandbox import problem_of

Render = Callable[..., str]

USER = {"role": "user", "content": " Hi "}
ASSISTANT = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Why?"}]
TOOL = {
    "type": "function",
    "function": {"name": "rain", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "rain", "arguments": {"city": "Rom"}}}],
}
ANSWER = {"role": "tool", "name": "rain", "content": "no"}

LLAMA2 = """
{%- if messages[0]['role'] == 'system' -%}
{%- set loop_messages = messages[1:] -%}{%- set system_message = messages[0]['content'] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- set system_message = false -%}{%- endif -%}
{%- for message in loop_messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if loop.index0 == 0 and system_message != false -%}
{%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] -%}
{%- else -%}{%- set content = message['content'] -%}{%- endif -%}
{%- if message['role'] == 'user' -%}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}{{ ' ' + content.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""

LLAMA3 = """
{%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{{- bos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one tool call at a time") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + date_string[2:3] }}{%- endif %}"""

QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

GEMMA = """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

PHI3 = """
{% for message in messages %}
{% if message['role'] in ['system', 'user'] %}{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}
{% else %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

MISTRAL = """
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- set rest = messages | rejectattr("role", "equalto", "system") | list %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}{%- for call in message.tool_calls %}{{- call.function|tojson }}{%- endfor %}{{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- else %}{{- '[TOOL_RESULTS] {"content": ' + message.content|string + '}[/TOOL_RESULTS]' }}{%- endif %}
{%- endfor %}"""

COMMAND_R = """
{{- bos_token -}}
{%- macro document_turn(documents) -%}
{% for doc in documents %}{{ "{" }}"{{ loop.index0 }}": {{ doc | tojson(indent=2) }}{{ "}" }}
{%- if not loop.last %}, {% endif %}{% endfor %}
{%- endmacro -%}
{%- for message in messages -%}
{%- set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message.role] -%}
{{ '<|START_OF_TURN_TOKEN|><|' ~ name ~ '_TOKEN|>' + message['content'] | trim + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor -%}
{%- if documents -%}{{ document_turn(documents) }}{%- endif -%}
{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}"""

DEEPSEEK = """
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '<\uff5cUser\uff5c>' + message['content'] }}
{%- elif message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<\uff5cAssistant\uff5c>' + content + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"""

GLM4 = """[gMASK]<sop>
{%- macro visible_text(content) -%}
{%- if content is string -%}{{- content }}
{%- elif content is iterable and content is not mapping -%}
{%- for item in content -%}
{%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- elif item is string -%}{{- item }}{%- endif -%}
{%- endfor -%}
{%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- for item in messages -%}
<|{{ item['role'] }}|>
{{ visible_text(item['content']) }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}
{%- endif -%}"""

GRANITE = """
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set system_message = "You are Granite." %}
{%- if tools and documents %}{%- set system_message = system_message + " Use both." %}
{%- elif thinking %}{%- set system_message = system_message + " Think." %}{%- endif %}
{%- set loop_messages = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- for message in loop_messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- if loop.last and add_generation_prompt %}
{{- '<|start_of_role|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '<|end_of_role|>' }}
{%- endif %}
{%- endfor %}"""

EXAONE = """
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}{{- '[|system|][|endofturn|]\\n' }}{%- endif %}
{{- '[|' + message['role'] + '|]' + message['content'] }}
{%- if message['role'] == 'user' %}{{- '\\n' }}{%- else %}{{- '[|endofturn|]\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}"""

SMOLLM3 = """
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" -%}
{%- for message in messages if message.role == 'system' -%}
{%- if "/no_think" in message.content -%}{%- set reasoning_mode = "/no_think" -%}{%- endif -%}
{%- endfor -%}
{{- "Today Date: " + strftime_now("%d %B %Y") + "\\nMode: " + reasoning_mode + "\\n" -}}
{%- for message in messages -%}
{%- if message.role == "system" %}{% continue %}{% endif -%}
{%- if message.role == "assistant" -%}
{% generation %}{{- "<|im_start|>assistant\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" -}}{% endgeneration %}
{%- elif loop.index0 > 8 %}{% break %}
{%- else -%}{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" ~ ("" if reasoning_mode == "/think" else "<think>\\n\\n</think>\\n") -}}
{%- endif -%}"""

OLMO2 = """
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}
{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}
{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}
{% else %}{{ '<|' ~ message['role'] ~ '|>\\n' + message['content'] + '\\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

INTERNLM2 = """{{ bos_token }}{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FALCON = """{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}
{{ message['role'] | capitalize + ': ' + message['content'].strip().replace('\\r\\n', '\\n').replace('\\n\\n', '\\n') }}
{% endfor %}{% if add_generation_prompt %}{{ '\\n' + 'Assistant:' }}{% endif %}"""

STARCODER = """{{bos_token}}{{'You are an AI coding assistant.\\n\\n'}}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{ raise_exception('System messages are not allowed in this template.') }}
{%- elif message['role'] == 'user' %}{{'### Instruction\\n' + message['content'] + '\\n\\n'}}
{%- else %}{{'### Response\\n' + message['content'] + eos_token + '\\n\\n'}}{%- endif %}
{%- endfor %}
{{'### Response\\n'}}"""

CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    (LLAMA2, TALK, {}, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Yes. </s><s>[INST] Why? [/INST]"),
    (
        LLAMA3,
        [*TALK, CALL, ANSWER],
        {},
        (
            "<s><|start_header_id|>system<|end_header_id|>\n"
            "\n"
            "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n"
            "\n"
            "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
            "\n"
            "Yes.<|eot_id|><|start_header_id|>user<|end_header_id|>\n"
            "\n"
            'Why?<|eot_id|>{"name": "rain", "parameters": {"city": "Rom"}}<|eot_id|><|start_header_id|>ipython<|e'
            "nd_header_id|>\n"
            "\n"
            '"no"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n'
            "\n"
            " "
        ),
    ),
    (
        LLAMA3,
        [USER, {"role": "tool", "content": [{"type": "text", "text": "no"}]}],
        {},
        (
            "<s><|start_header_id|>user<|end_header_id|>\n"
            "\n"
            "Hi<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n"
            "\n"
            '[{"type": "text", "text": "no"}]<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n'
            "\n"
            " "
        ),
    ),
    (
        QWEN3,
        [SYSTEM, USER],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        QWEN3,
        [USER],
        {"enable_thinking": False},
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    (
        QWEN3,
        [SYSTEM, USER, CALL, ANSWER, ANSWER],
        {"tools": [TOOL]},
        (
            "<|im_start|>system\n"
            "Be brief.\n"
            "\n"
            "<tools>\n"
            '{"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {"c'
            'ity": {"type": "string"}}}}}\n'
            "</tools><|im_end|>\n"
            "<|im_start|>user\n"
            " Hi <|im_end|>\n"
            "<|im_start|>assistant\n"
            "<tool_call>\n"
            '{"name": "rain", "arguments": {"city": "Rom"}}\n'
            "</tool_call><|im_end|>\n"
            "<|im_start|>user\n"
            "<tool_response>\n"
            "no\n"
            "</tool_response>\n"
            "<tool_response>\n"
            "no\n"
            "</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
    ),
    (
        QWEN3,
        [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}],
        {"add_generation_prompt": False},
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nYes.<|im_end|>\n",
    ),
    (
        GEMMA,
        [USER, ASSISTANT, USER],
        {},
        (
            "\n"
            "<s><start_of_turn>user\n"
            "Hi<end_of_turn>\n"
            "\n"
            "<start_of_turn>model\n"
            "Yes.<end_of_turn>\n"
            "\n"
            "<start_of_turn>user\n"
            "Hi<end_of_turn>\n"
            "\n"
            "<start_of_turn>model\n"
        ),
    ),
    (
        PHI3,
        TALK,
        {"add_generation_prompt": False},
        (
            "\n"
            "<|system|>\n"
            "Be brief.<|end|>\n"
            "\n"
            "<|user|>\n"
            " Hi <|end|>\n"
            "\n"
            "<|assistant|>\n"
            "Yes.<|end|>\n"
            "<|user|>\n"
            "Why?<|end|>\n"
            "\n"
            "</s>"
        ),
    ),
    (
        MISTRAL,
        [USER, CALL, ANSWER, ASSISTANT, USER],
        {"tools": [TOOL]},
        (
            '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "rain", "parameters": {"type": "obje'
            'ct", "properties": {"city": {"type": "string"}}}}}][/AVAILABLE_TOOLS][INST]  Hi [/INST][TOOL_CALLS] '
            '[{"name": "rain", "arguments": {"city": "Rom"}}]</s>[TOOL_RESULTS] {"content": no}[/TOOL_RESULTS] Ye'
            's.</s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "rain", "parameters": {"type": "o'
            'bject", "properties": {"city": {"type": "string"}}}}}][/AVAILABLE_TOOLS][INST]  Hi [/INST]'
        ),
    ),
    (
        COMMAND_R,
        TALK,
        {"documents": [{"title": "a"}, {"title": "b"}]},
        (
            "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USE"
            "R_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Yes.<|END_OF_TURN_TOKEN|><|S"
            'TART_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|>{"0": {\n'
            '  "title": "a"\n'
            '}}, {"1": {\n'
            '  "title": "b"\n'
            "}}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
    ),
    (
        DEEPSEEK,
        [SYSTEM, SYSTEM, USER, {"role": "assistant", "content": "<think>hm</think>Yes."}, USER],
        {},
        "\n<s>Be brief.\n\nBe brief."
        "<\uff5cUser\uff5c> Hi <\uff5cAssistant\uff5c>Yes.</s><\uff5cUser\uff5c> Hi <\uff5cAssistant\uff5c><think>\n",
    ),
    (
        GLM4,
        [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}],
        {"enable_thinking": False},
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi!<|assistant|>\n<think></think>",
    ),
    (
        GRANITE,
        [USER],
        {"thinking": True, "controls": {"length": "short"}},
        (
            "<|start_of_role|>system<|end_of_role|>You are Granite. Think.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|> Hi <|end_of_text|>\n"
            '<|start_of_role|>assistant {"length": "short"}<|end_of_role|>'
        ),
    ),
    (
        EXAONE,
        [USER, ASSISTANT, USER],
        {},
        "[|system|][|endofturn|]\n[|user|] Hi \n[|assistant|]Yes.[|endofturn|]\n[|user|] Hi \n[|assistant|]",
    ),
    (
        SMOLLM3,
        TALK,
        {"enable_thinking": False},
        (
            "Today Date: DATE\n"
            "Mode: /no_think\n"
            "<|im_start|>user\n"
            " Hi <|im_end|>\n"
            "<|im_start|>assistant\n"
            "Yes.<|im_end|>\n"
            "<|im_start|>user\n"
            "Why?<|im_end|>\n"
            "<|im_start|>assistant\n"
            "<think>\n"
            "\n"
            "</think>\n"
        ),
    ),
    (
        OLMO2,
        TALK,
        {},
        "\n<s><|system|>\nBe brief.\n<|user|>\n Hi \n<|assistant|>\nYes.</s>\n\n<|user|>\nWhy?\n<|assistant|>\n",
    ),
    (OLMO2, [USER, ASSISTANT], {"add_generation_prompt": False}, "\n<s><|user|>\n Hi \n<|assistant|>\nYes.</s>"),
    (INTERNLM2, [USER], {}, "<s><|im_start|>user\n Hi <|im_end|>\n\n<|im_start|>assistant\n"),
    (FALCON, [{"role": "user", "content": " a\r\n\r\nb "}], {}, "User: a\nb\n\nAssistant:"),
    (
        STARCODER,
        [USER, ASSISTANT, USER],
        {},
        (
            "<s>You are an AI coding assistant.\n"
            "\n"
            "### Instruction\n"
            " Hi \n"
            "\n"
            "### Response\n"
            "Yes.</s>\n"
            "\n"
            "### Instruction\n"
            " Hi \n"
            "\n"
            "### Response\n"
        ),
    ),
]
REFUSALS = [
    (LLAMA2, [USER, USER], "Conversation roles must alternate"),
    (LLAMA3, [{**CALL, "tool_calls": [1, 2]}], "one tool call at a time"),
    (GEMMA, TALK, "System role not supported"),
    (STARCODER, TALK, "System messages are not allowed"),
]


@pytest.fixture
def render() -> Iterator[Render]:
    templates: list[ChatTemplate] = []

    def rendered(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
        templates.append(ChatTemplate(source, bos_token="<s>", eos_token="</s>"))
        return templates[-1].render(messages, **variables)

    yield rendered
    for template in templates:
        template.close()


@pytest.mark.parametrize(("source", "messages", "variables", "expected"), CASES)
def test_prompts(
    render: Render, source: str, messages: list[dict[str, Any]], variables: dict[str, Any], expected: str
) -> None:
    today = datetime.now().strftime("%d %B %Y")
    assert render(source, messages, **variables).replace(today, "DATE") == expected


@pytest.mark.parametrize(("source", "messages", "said"), REFUSALS)
def test_refusals(render: Render, source: str, messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        render(source, messages)


@pytest.mark.parametrize("source", dict.fromkeys(source for source, *_ in CASES))
def test_they_are_found_sound_at_load(source: str) -> None:
    assert problem_of(source) is None
