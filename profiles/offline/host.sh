# Sourced on an offline host, in the folder of the checkout: `. profiles/offline/host.sh COMMIT [WHEELS]`.
# Copies the sources to a place where calls do not change them under a job, installs the wheels beside the host's own
# packages, and says where things are. COMMIT is what the sources are, for records; the host needs no git.
export OFFLINE=${OFFLINE:-/tmp/compressible}
if [ -z "$1" ]; then
  echo "expected the commit of these sources: . profiles/offline/host.sh COMMIT [WHEELS]" >&2
  return 2
fi
# Records would name a commit whose sources are not what ran.
if [ -e "$OFFLINE/ready" ] && [ "$(cat "$OFFLINE/ready")" != "$1" ]; then
  echo "$OFFLINE holds the sources of commit $(cat "$OFFLINE/ready"), expected $1: OFFLINE names another place" >&2
  return 2
fi
export COMPRESSIBLE_COMMIT=$1
export COMPRESSIBLE_CACHE=$OFFLINE/cache COMPRESSIBLE_FIGURES=$OFFLINE/figures COMPRESSIBLE_LANES=$OFFLINE/lanes
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 COMPRESSIBLE_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$OFFLINE/site:$OFFLINE/tree/lib JUPYTER_PATH=$OFFLINE/kernel/share/jupyter
if [ ! -e "$OFFLINE/ready" ]; then
  mkdir -p "$OFFLINE/tree" "$COMPRESSIBLE_CACHE" "$COMPRESSIBLE_FIGURES"
  cp -r lib notebooks data benchmarks profiles pyproject.toml constraints*.txt "$OFFLINE/tree/"
  if [ -d "${2:-.gpu/wheels}" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$OFFLINE/site" "${2:-.gpu/wheels}"/*.whl
  fi
  python3 -m ipykernel install --prefix "$OFFLINE/kernel" --name python3 >/dev/null && echo "$1" >"$OFFLINE/ready"
fi
pushd "$OFFLINE/tree" >/dev/null || return
