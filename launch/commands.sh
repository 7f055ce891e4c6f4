# What every launcher starts with: its variables, and commands that are printed before they run.
# shellcheck shell=bash

dry_run="" # anything else: commands are printed, none runs

# Ends the launcher: there is something to mend, said in one sentence.
mend() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# need NAME MEANING: ends the launcher where the environment variable is not set.
need() {
  [[ -n ${!1:-} ]] || mend "$1 is not set: it is $2 (launch/README.md has every variable)"
}

# need_numbers NAME...: ends the launcher where one of these is not a whole number.
need_numbers() {
  local variable
  for variable; do
    [[ ${!variable} =~ ^[0-9]+$ ]] || mend "$variable is ${!variable@Q}: write a whole number"
  done
}

# Prints words so that a shell that reads them back gets the same words.
quoted() {
  local word separator=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

# Prints a command, then runs it; under --dry-run it only prints.
run() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  mend "this is bash $BASH_VERSION: the launchers need bash 4.4 or later"
