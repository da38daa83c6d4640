#!/bin/bash
# Stands for systemctl where no systemd runs: does with the installed units of spooltap what systemd would do, as far as
# it matters for the commands: user, state directory, credentials, the units' own command lines.
set -u
units=/usr/lib/systemd/system
verb='' now='' names=()
for word; do
  case $word in
    --now) now=1 ;;
    --signal=*) signal=${word#--signal=} ;;
    -*) ;;
    *) if [ -z "$verb" ]; then verb=$word; else names+=("$word"); fi ;;
  esac
done

value() { sed -n "s/^$2=//p" "$units/$1"; }

main() { [ -s "/run/$1.pid" ] && kill -0 "$(cat "/run/$1.pid")" 2>/dev/null && cat "/run/$1.pid"; }

start_service() {
  main "$1" >/dev/null && return
  local user group state credentials name source
  user=$(value "$1" User) group=$(value "$1" Group) state=/var/lib/$(value "$1" StateDirectory)
  if [ "$(value "$1" Type)" = oneshot ]; then
    eval "$(value "$1" ExecStart | sed 's#^/bin/systemctl#"$0"#')"
    return
  fi
  mkdir -p -m "$(value "$1" StateDirectoryMode)" "$state"
  # As systemd: everything below, but only when the directory itself is somebody else's.
  [ "$(stat -c %U:%G "$state")" = "$user:$group" ] || chown -R "$user:$group" "$state"
  credentials=/run/credentials/$1
  mkdir -p "$credentials"
  value "$1" SetCredential | while IFS=: read -r name source; do printf "$source" >"$credentials/$name"; done
  value "$1" LoadCredential | while IFS=: read -r name source; do [ ! -e "$source" ] || cat "$source" >"$credentials/$name"; done
  chown -R "$user:$group" "$credentials" && chmod 0400 "$credentials"/* && chmod 0500 "$credentials"
  as() { ${as:-} setpriv --reuid "$user" --regid "$group" --clear-groups -- env -i "PATH=$PATH" "CREDENTIALS_DIRECTORY=$credentials" "$@"; }
  as $(value "$1" ExecStartPre) >>"/var/log/$1.log" 2>&1 || { cat "/var/log/$1.log"; return 1; }
  # The process itself, as systemd knows it: no shell around it.
  (
    echo $BASHPID >"/run/$1.pid"
    as=exec
    as $(value "$1" ExecStart)
  ) </dev/null >>"/var/log/$1.log" 2>&1 &
  # READY means that changes are noticed; this waits for it.
  for _ in $(seq 600); do
    grep -q ' live$' "/var/log/$1.log" && return
    main "$1" >/dev/null || { cat "/var/log/$1.log"; return 1; }
    sleep 0.1
  done
  return 1
}

stop_service() {
  local pid
  pid=$(main "$1") || return 0
  kill "$pid"
  for _ in $(seq 400); do kill -0 "$pid" 2>/dev/null || { rm -f "/run/$1.pid" && : >"/var/log/$1.log"; return 0; }; sleep 0.1; done
  return 1
}

for name in "${names[@]}"; do
  case $name in
    systemd-sysctl)
      # The limits of this machine are not ours to change: only whether the kernel has them.
      sed -n 's/^\([a-z._]*\) = [0-9]*$/\1/p' /usr/lib/sysctl.d/60-spooltap.conf | tr . / | while read -r key; do
        [ -w "/proc/sys/$key" ] || exit 1
      done || exit 1
      continue ;;
    *.*) ;;
    *) name=$name.service ;;
  esac
  case $name in *@*) continue ;; esac
  [ -e "$units/$name" ] || { echo "Unit $name could not be found." >&2; exit 4; }
  case $verb:$name in
    enable:*) grep -q '^\[Install\]' "$units/$name" || exit 1; [ -z "$now" ] || case $name in *.service) start_service "$name" || exit 1 ;; esac ;;
    start:*.service) start_service "$name" || exit 1 ;;
    stop:*.service) stop_service "$name" || exit 1 ;;
    disable:*) [ -z "$now" ] || case $name in *.service) stop_service "$name" || exit 1 ;; esac ;;
    reload:*) MAINPID=$(main "$name") || exit 1; eval "$(value "$name" ExecReload)" || exit 1 ;;
    kill:*) kill "-$signal" "$(main "$name")" || exit 1 ;;
    status:*) main "$name" >/dev/null || exit 3; echo "$name: active (running)" ;;
    *) echo "not understood: $*" >&2; exit 1 ;;
  esac
done
