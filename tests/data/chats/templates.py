"""Small chat templates that behave as those of well-known models do."""

CALLS = (
    '{%- macro call(c) -%}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{%- endmacro -%}"
)
_TOOLS = (
    "{%- if tools %}<|im_start|>system\n{{ messages[0].content + '\n' if messages[0].role == 'system' else '' }}"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif -%}"
)
QWEN2 = (
    CALLS + _TOOLS + "{%- for m in messages -%}{%- if m.role == 'system' and loop.first and tools -%}"
    "{%- elif m.role in ('system', 'user') -%}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}{{ '<|im_start|>assistant' }}{%- if m.content -%}{{ '\n' ~ m.content }}{%- endif -%}"
    "{%- for c in m.tool_calls or [] -%}{{ '\n' ~ call(c) }}{%- endfor -%}{{ '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' -%}{{ '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""Qwen2.5's: tools in a system turn, results in a user turn, no thoughts, no developer."""
QWEN3 = (
    CALLS + _TOOLS + "{%- set ns = namespace(asked=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.role == 'system' and loop.first and tools -%}"
    "{%- elif m.role in ('system', 'user') -%}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}{%- set thoughts = m.reasoning_content or '' -%}{%- set text = m.content or '' -%}"
    "{%- if '</think>' in text -%}{%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.asked and (loop.last or thoughts) -%}{{ '<think>\n' ~ thoughts ~ '\n</think>\n\n' }}{%- endif -%}"
    "{{ text }}{%- for c in m.tool_calls or [] -%}{{ call(c) }}{%- endfor -%}{{ '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' -%}{{ '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)
"""Qwen3's: thoughts before an answer, dropped once a user says more."""
LLAMA3 = (
    "{{ bos_token }}{%- for m in messages -%}{%- if 'tool_calls' in m -%}{%- if m.tool_calls | length != 1 -%}"
    "{{ raise_exception('only single tool-calls') }}{%- endif -%}{%- set f = m.tool_calls[0].function -%}"
    "{{ '<h>assistant</h>\n' ~ '{\"name\": \"' ~ f.name ~ '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' -%}{{ '<h>ipython</h>\n' }}{{ m.content | tojson }}{{ '<|eot_id|>' }}"
    "{%- else -%}{{ '<h>' ~ m.role ~ '</h>\n' }}{%- if tools and m.role == 'user' and loop.index0 < 2 -%}"
    "{%- for t in tools -%}{{ t | tojson ~ '\n' }}{%- endfor -%}{%- endif -%}{{ m.content | trim ~ '<|eot_id|>' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<h>assistant</h>\n' }}{%- endif -%}"
)
"""Llama 3.1's: tools in the first user turn, one call a turn, no text beside it, results as JSON."""
MISTRAL = (
    "{{ bos_token }}{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- if tools and m == users[-1] -%}[TOOLS]{{ tools | tojson }}[/TOOLS]"
    "{%- endif -%}[INST] {{ m.content }}[/INST]{%- elif m.tool_calls -%}[CALLS] ["
    "{%- for c in m.tool_calls -%}{%- if c.id is not defined or c.id | length != 9 -%}{{ raise_exception('ids have 9 letters') }}"
    '{%- endif -%}{{ \', \' if not loop.first }}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    "\"id\": \"{{ c.id }}\"}{%- endfor -%}]{{ eos_token }}{%- elif m.role == 'assistant' -%}{{ ' ' ~ m.content ~ eos_token }}"
    "{%- elif m.role == 'tool' -%}[RESULT] {{ m.content }} for {{ m.tool_call_id }}[/RESULT]"
    "{%- else -%}{{ raise_exception('no ' ~ m.role ~ ' here') }}{%- endif -%}{%- endfor -%}"
)
"""Mistral's: no system turn, ids of nine letters, tools before the last user turn (so earlier turns change), no generation prompt."""
DEEPSEEK = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{ '<A>' }}{%- if m.content is not defined -%}{%- for c in m.tool_calls -%}"
    "{{ '<call>' + c.function.name + '\n' + c.function.arguments + '</call>' }}{%- endfor -%}{%- else -%}{{ m.content }}{%- endif -%}"
    "{{ eos_token }}{%- else -%}{{ '<' ~ m.role ~ '>' ~ (tools | tojson if tools and loop.first else '') ~ m.content }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<A>' }}{%- endif -%}"
)
"""DeepSeek's: arguments as text, and calls only where there is no content."""
