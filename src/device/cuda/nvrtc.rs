//! CUDA's run-time compiler, loaded when it is needed: no toolkit has to be installed, torch brings it along.
//!
//! What it makes is kept in the user's cache folder by architecture, compiler and source, so that only the first run compiles.
#![expect(unsafe_code, reason = "calls into NVRTC")]

use std::{
    ffi::{CStr, CString, OsString, c_char, c_int, c_void},
    fs,
    hash::Hasher,
    io::Write,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    ptr::{self, NonNull},
    sync::Mutex,
};

use crate::error::{Code, Error, Result};

/// Where else to look for the library; Python adds the folders of its packages.
static SEARCH: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Names under which systems have it, newest first.
const NAMES: [&str; 4] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"];
const FOLDERS: [&str; 2] = ["/usr/local/cuda/lib64", "/opt/cuda/lib64"];
const OPTIONS: [&CStr; 2] = [c"--fmad=false", c"--std=c++17"];

/// Adds files or folders in which the compiler may lie.
pub fn search(paths: Vec<PathBuf>) {
    let mut known = SEARCH.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    known.extend(paths);
}

type Program = *mut c_void;

/// The entry points that are used; all return 0 for success.
struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

/// Machine code of `source` for compute capability `major.minor`, from the cache or from the compiler.
///
/// # Errors
/// `FN-E003` when the compiler is not found or refuses.
pub(super) fn cubin(name: &str, source: &str, (major, minor): (c_int, c_int)) -> Result<Vec<u8>> {
    let nvrtc = Nvrtc::load()?;
    let cached = cache_file(name, source, (major, minor), nvrtc.release());
    if let Some(found) = cached.as_deref().and_then(|path| fs::read(path).ok()).filter(|bytes| is_elf(bytes)) {
        return Ok(found);
    }
    let made = nvrtc.build(name, source, &format!("--gpu-architecture=sm_{major}{minor}"))?;
    if let Some(path) = cached {
        // A cache that cannot be written costs the next run a second.
        let _ = keep(&path, &made);
    }
    Ok(made)
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

fn cache_file(name: &str, source: &str, (major, minor): (c_int, c_int), release: (c_int, c_int)) -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    let mut hash = twox_hash::XxHash3_64::new();
    hash.write(source.as_bytes());
    let key = format!("{name}-sm{major}{minor}-nvrtc{}.{}-{:016x}.cubin", release.0, release.1, hash.finish());
    Some(folder.join("funicular").join(key))
}

/// Writes beside and renames: another process may read at the same moment.
fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = fs::File::create(&beside).and_then(|mut file| file.write_all(bytes));
    written.and_then(|()| fs::rename(&beside, path)).inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

impl Nvrtc {
    fn load() -> Result<Self> {
        let library = open_library().ok_or_else(|| {
            Error::new(Code::NoCompiler, "CUDA's run-time compiler (libnvrtc) was not found.").action(
                "It comes with CUDA builds of torch (package nvidia-cuda-nvrtc); install one. One rank can do without: set \
                 optimizer.where = \"cpu\" and no unit's optimizer.tier to \"hbm\".",
            )
        })?;
        macro_rules! find {
            ($name:literal) => {{
                // SAFETY: the handle is valid and the name a C string.
                let address = unsafe { libc::dlsym(library.as_ptr(), $name.as_ptr()) };
                if address.is_null() {
                    let name = $name.to_string_lossy();
                    return Err(Error::new(Code::NoCompiler, format!("libnvrtc has no {name}; it is too old."))
                        .action("Install a CUDA build of torch for CUDA 11.2 or later."));
                }
                // SAFETY: the field's type is the one that NVRTC's header declares for this name.
                unsafe { std::mem::transmute_copy(&address) }
            }};
        }
        Ok(Self {
            version: find!(c"nvrtcVersion"),
            create: find!(c"nvrtcCreateProgram"),
            compile: find!(c"nvrtcCompileProgram"),
            log_size: find!(c"nvrtcGetProgramLogSize"),
            log: find!(c"nvrtcGetProgramLog"),
            cubin_size: find!(c"nvrtcGetCUBINSize"),
            cubin: find!(c"nvrtcGetCUBIN"),
            destroy: find!(c"nvrtcDestroyProgram"),
        })
    }

    fn release(&self) -> (c_int, c_int) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        unsafe { (self.version)(&raw mut major, &raw mut minor) };
        (major, minor)
    }

    fn build(&self, name: &str, source: &str, target: &str) -> Result<Vec<u8>> {
        let text = |s: &str| CString::new(s).map_err(|_| Error::new(Code::NoCompiler, "a kernel holds a zero byte."));
        let (source, file, target) = (text(source)?, text(name)?, text(target)?);
        let mut program: Program = ptr::null_mut();
        // SAFETY: writes one handle, destroyed below; reads C strings during the call.
        let made =
            unsafe { (self.create)(&raw mut program, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null()) };
        if made != 0 {
            return Err(Error::new(Code::NoCompiler, format!("NVRTC could not start (status {made}).")));
        }
        let options = [target.as_ptr(), OPTIONS[0].as_ptr(), OPTIONS[1].as_ptr()];
        // SAFETY: the program is alive, the options are C strings.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let result = if compiled == 0 {
            self.text_of(program, self.cubin_size, self.cubin)
        } else {
            let log = self.text_of(program, self.log_size, self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            Err(Error::new(Code::NoCompiler, format!("NVRTC refused {name} (status {compiled}): {}", log.trim()))
                .action("Report this message, the GPU and the version of torch."))
        };
        // SAFETY: made above, and not used after.
        unsafe { (self.destroy)(&raw mut program) };
        result
    }

    fn text_of(
        &self,
        program: Program,
        size_of: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: writes one integer.
        let mut status = unsafe { size_of(program, &raw mut size) };
        let mut bytes = vec![0u8; size];
        if status == 0 {
            // SAFETY: the buffer has the size that the compiler named.
            status = unsafe { get(program, bytes.as_mut_ptr().cast()) };
        }
        match status {
            0 => Ok(bytes),
            _ => Err(Error::new(Code::NoCompiler, format!("NVRTC gave no result (status {status})."))),
        }
    }
}

fn open_library() -> Option<NonNull<c_void>> {
    let added = SEARCH.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let mut places: Vec<PathBuf> = Vec::new();
    for path in &added {
        if path.is_dir() {
            places.extend(NAMES.iter().map(|name| path.join(name)));
        } else {
            places.push(path.clone());
        }
    }
    places.extend(NAMES.iter().map(PathBuf::from));
    places.extend(FOLDERS.iter().flat_map(|folder| NAMES.iter().map(move |name| Path::new(folder).join(name))));
    places.into_iter().find_map(|path| {
        let path = CString::new(OsString::from(path).into_vec()).ok()?;
        // SAFETY: a C string; the library's constructors are those that any CUDA program runs.
        NonNull::new(unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_replaced_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a/b.cubin");
        keep(&path, b"\x7fELF one").expect("written");
        keep(&path, b"\x7fELF two").expect("written again");
        assert_eq!(fs::read(&path).expect("there"), b"\x7fELF two");
        assert_eq!(fs::read_dir(path.parent().expect("a folder")).expect("read").count(), 1, "nothing else is left");
    }

    #[test]
    fn without_a_compiler_the_error_says_so_and_with_one_the_kernels_compile() {
        for (name, source) in [("adamw.cu", super::super::kernels::SOURCE), ("mean.cu", super::super::means::SOURCE)] {
            match cubin(name, source, (9, 0)) {
                Ok(code) => assert!(is_elf(&code)),
                Err(error) => assert_eq!(error.code(), Code::NoCompiler, "{error}"),
            }
        }
    }
}
