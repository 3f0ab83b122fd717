#!/bin/sh
# A whole agent in POSIX sh and curl.
#
# It speaks stream-json, as command-line agents do: one JSON object a line on stdin and stdout. It
# works in steps; in each it calls the session API through the sidecar's proxy, without any
# credential, and answers the messages that people wrote meanwhile. Then it ends by itself.
#
# Environment, given by the runner:
#   SESSION_ID         the session that it works in
#   AMBIENT_PROXY_URL  the API server, through the proxy that adds the token
# Its pace:
#   DEMO_STEPS         number of steps (12)
#   DEMO_PAUSE         seconds between two steps (1)
#
# Exit code: 0; 1 when the API refused a call or could not be reached; 78 on a bad setting.

set -u
# Text is bytes here: what people write is handed back as it came.
LC_ALL=C
export LC_ALL

refuse() {
    printf 'agent.sh: %s\n' "$1" >&2
    exit 78
}

[ -n "${SESSION_ID:-}" ] || refuse 'SESSION_ID is not set; is this started by the runner?'
[ -n "${AMBIENT_PROXY_URL:-}" ] || refuse 'AMBIENT_PROXY_URL is not set; is there a sidecar?'
steps=${DEMO_STEPS:-12}
case $steps in
    '' | *[!0-9]*) refuse 'DEMO_STEPS is not a whole number' ;;
esac
pause=${DEMO_PAUSE:-1}
case $pause in
    '' | *[!0-9.]*) refuse 'DEMO_PAUSE is not a number of seconds' ;;
esac
command -v curl >/dev/null || refuse 'curl is not installed'

scratch=$(mktemp -d) || exit 1
reader=
clean_up() {
    [ -z "$reader" ] || kill "$reader" 2>/dev/null
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'exit 129' HUP

# Each line of output is one printf, and so one write: two lines never mix.
# The arguments must be inside of JSON strings already.
say() {
    printf '{"type":"assistant","message":{"role":"assistant","content":[{"type":"text","text":"%s"}]}}\n' "$1"
}

tool_use() {
    printf '{"type":"assistant","message":{"role":"assistant","content":[{"type":"tool_use","id":"%s","name":"api","input":{"request":"%s"}}]}}\n' "$1" "$2"
}

tool_result() {
    printf '{"type":"user","message":{"role":"user","content":[{"type":"tool_result","tool_use_id":"%s","content":"%s"}]}}\n' "$1" "$2"
}

result() {
    printf '{"type":"result","subtype":"%s","is_error":%s,"num_turns":%s,"result":"%s"}\n' "$1" "$2" "$steps" "$3"
}

# A shell's `read` waits, so a second process does the waiting. Without the 3 its stdin would be
# /dev/null, as for every background process.
: >"$scratch/inbox"
exec 3<&0
while IFS= read -r line; do
    printf '%s\n' "$line" >>"$scratch/inbox"
done <&3 &
reader=$!
exec 3<&- </dev/null

# Answers the messages that came since the last time. The text stays the JSON string it was: what
# stands between the quotes goes into the answer as it is, escapes included.
answered=0
answer_messages() {
    tail -n "+$((answered + 1))" "$scratch/inbox" >"$scratch/new"
    while IFS= read -r line; do
        answered=$((answered + 1))
        case $line in
            *'"type":"user"'* | *'"type": "user"'*) ;;
            *) continue ;;
        esac
        text=$(printf '%s\n' "$line" |
            sed -nE 's/.*"text": *"(([^"\\]|\\.)*)".*/\1/p')
        say "You said: $text"
    done <"$scratch/new"
}

# GET of this session: sets `status` to the HTTP status, 000 when there is no answer, and `phase`.
get_session() {
    status=$(curl -sS --noproxy '*' -m 10 -o "$scratch/answer" -w '%{http_code}' \
        "$AMBIENT_PROXY_URL/api/ambient/v1/sessions/$SESSION_ID" 2>"$scratch/why") || status=000
    phase=$(sed -nE 's/.*"phase": *"([A-Za-z]*)".*/\1/p' "$scratch/answer" 2>/dev/null | head -n 1)
}

printf '{"type":"system","subtype":"init","tools":["api"]}\n'
say "I work $steps steps, $pause s apart, and call the API in each. Write to me meanwhile."

step=0
while [ "$step" -lt "$steps" ]; do
    step=$((step + 1))
    answer_messages

    tool_use "step-$step" 'GET this session'
    tries=1
    get_session
    # An API server that restarts is no failure of ours. A refusal is: the token is always fresh.
    while [ "$tries" -lt 30 ]; do
        case $status in
            000 | 5??) ;;
            *) break ;;
        esac
        sleep 1
        tries=$((tries + 1))
        get_session
    done
    tool_result "step-$step" "HTTP $status, phase ${phase:-unknown}, try $tries"

    if [ "$status" != 200 ]; then
        cat "$scratch/why" >&2
        say "Step $step of $steps: the API answered $status. I give up."
        result error_during_execution true "HTTP $status in step $step"
        exit 1
    fi
    say "Step $step of $steps: the API knows me without a credential, my phase is ${phase:-unknown}."
    [ "$step" -eq "$steps" ] || sleep "$pause"
done

answer_messages
say 'All steps are done.'
result success false "$steps steps"
