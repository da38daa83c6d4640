//! Private instances of the installed Cyrus (Debian's 3.6.1), each in a directory and on a loopback address of its own.
//!
//! Another build takes its place where a variable names the folder it was installed in: `SPOOLTAP_CYRUS_SOURCE` for the
//! servers that clients work on, `SPOOLTAP_CYRUS_REPLICA` for all others.
//!
//! Nothing of the system's own Cyrus is touched: other configuration, other directories, other address. When the
//! test process dies, however it dies, its servers die with it.

use super::eventually;
use super::imap::Imap;
use super::names::Names;
use super::process::{Group, members};
use super::sieve::Sieve;
use super::smtp::Lmtp;
use anyhow::{Context, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::User;
use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;
use tempfile::TempDir;

pub const PROGRAMS: &str = "/usr/lib/cyrus/bin";
const IMAP: u16 = 1143;
const CSYNC: u16 = 2005;
const SIEVE: u16 = 4190;

/// Password of everybody.
pub const PASSWORD: &str = "secret";

/// The administrator through whose eyes everything is seen that no user sees, and the one who replicates.
pub const ADMIN: &str = "cyrus";
pub const REPLICATOR: &str = "repl";

/// Whether a Cyrus is installed that can be started here. Says so on stderr if not, or fails the test if there has
/// to be one (`SPOOLTAP_REQUIRE_CYRUS=1`).
pub fn installed() -> bool {
    let needed = ["master", "imapd", "lmtpd", "timsieved", "sync_server", "sync_client", "unexpunge"];
    let roles = [Role::Source, Role::Replica];
    let missing: Vec<PathBuf> = roles
        .into_iter()
        .flat_map(|role| needed.map(|name| role.program(name)))
        .filter(|program| !program.exists())
        .collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var_os("SPOOLTAP_REQUIRE_CYRUS").is_some();
    assert!(!required, "Cyrus is not installed: {missing:?} missing");
    // Not eprintln: the harness keeps that to itself when a test passes.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: needs an installed Cyrus, see tests/run\n");
    false
}

/// Which end a server is: each may be of another release.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Role {
    Source,
    #[default]
    Replica,
}

impl Role {
    /// Where a program of its release is: one folder in Debian's package, several where `make install` put them.
    fn program(self, name: &str) -> PathBuf {
        let variable = match self {
            Role::Source => "SPOOLTAP_CYRUS_SOURCE",
            Role::Replica => "SPOOLTAP_CYRUS_REPLICA",
        };
        let Some(prefix) = std::env::var_os(variable).map(PathBuf::from) else { return Path::new(PROGRAMS).join(name) };
        let places = ["libexec", "sbin", "bin", "cyrus/bin"].map(|folder| prefix.join(folder).join(name));
        places.into_iter().find(|program| program.exists()).unwrap_or_else(|| prefix.join(name))
    }
}

/// How a server is set up.
#[derive(Clone, Debug, Default)]
pub struct Options {
    conf: BTreeMap<String, String>,
    users: Vec<String>,
    role: Role,
}

impl Options {
    pub fn new() -> Self {
        Self::default()
    }

    /// An option of imapd.conf; `@BASE@` in the value is the server's directory, an empty value takes a default away.
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.conf.insert(key.into(), value.to_string());
        self
    }

    /// Clients work on it, and something replicates from it.
    pub fn source(mut self) -> Self {
        self.role = Role::Source;
        self
    }

    /// Accounts made when the server starts for the first time, with an INBOX that `cyrus` may administer.
    pub fn users<S: AsRef<str>>(mut self, users: &[S]) -> Self {
        self.users.extend(users.iter().map(|user| user.as_ref().to_owned()));
        self
    }

    /// The options that `sync_client` needs to replicate to `replica`.
    pub fn replicate_to(self, replica: &CyrusServer) -> Self {
        self.set("sync_host", replica.address).set("sync_port", CSYNC)
    }

    /// What the names in a store depend on, taken from that store's imapd.conf: a replica has to agree in it.
    pub fn names_of(mut self, conf: &Path, release: &str) -> Self {
        let text = fs::read_to_string(conf).expect("imapd.conf is readable");
        let modern = !release.starts_with("2.");
        // Changed from no to yes by 3.0.
        self.conf.insert("unixhierarchysep".into(), if modern { "yes" } else { "no" }.into());
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            if matches!(key.trim(), "unixhierarchysep" | "virtdomains" | "defaultdomain") {
                self.conf.insert(key.trim().into(), value.trim().into());
            }
        }
        self
    }
}

/// A running server; it ends when this is dropped.
pub struct CyrusServer {
    // Dropped first: a directory can only be removed when nobody writes to it.
    master: Option<Group>,
    base: TempDir,
    address: Ipv4Addr,
    options: Options,
}

impl CyrusServer {
    /// Sets a server up and starts it.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let mut server = Self::prepare(options)?;
        server.boot()?;
        server.make_users()?;
        Ok(server)
    }

    /// Sets a server up without starting it: `conf`, `spool` and `sieve` below `base` are still empty.
    pub fn prepare(options: Options) -> anyhow::Result<Self> {
        let base = tempfile::Builder::new().prefix("spooltap-cyrus-").tempdir()?;
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755))?;
        let server = Self { base, address: free_address()?, options, master: None };
        for dir in ["db", "socket", "log", "msg", "proc", "ptclient", "quota", "user", "lock", "sync"] {
            fs::create_dir_all(server.base().join("conf").join(dir))?;
        }
        fs::create_dir_all(server.base().join("spool/stage."))?;
        fs::create_dir_all(server.base().join("sieve"))?;
        for (key, value) in server.settings() {
            if key.starts_with("partition-") || key.starts_with("metapartition-") {
                fs::create_dir_all(value)?;
            }
        }
        fs::write(server.base().join("sasldb2"), passwords()?)?;
        server.write_conf()?;
        Ok(server)
    }

    /// Starts the server that was prepared or stopped.
    pub fn boot(&mut self) -> anyhow::Result<()> {
        if self.master.is_some() {
            return Ok(());
        }
        give_to_cyrus(self.base())?;
        let log = fs::File::create(self.base().join("master.log"))?;
        let mut command = Command::new(self.program("master"));
        command.arg("-C").arg(self.conf()).arg("-M").arg(self.base().join("cyrus.conf"));
        command.arg("-p").arg(self.base().join("master.pid"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir(self.base());
        self.master = Some(Group::spawn(as_cyrus(&mut command)).context("cannot start Cyrus's master")?);
        let address = self.socket_address(IMAP);
        let ready = eventually(Duration::from_secs(20), || {
            let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
            std::io::Read::read(&mut { stream }, &mut [0; 64]).ok().filter(|&count| count > 0)
        });
        ready.map(drop).ok_or_else(|| {
            let log = fs::read_to_string(self.base().join("master.log")).unwrap_or_default();
            anyhow!("Cyrus in {} does not answer: {log}", self.base().display())
        })
    }

    /// Makes the accounts named in the options.
    pub fn make_users(&self) -> anyhow::Result<()> {
        if self.options.users.is_empty() {
            return Ok(());
        }
        let mut admin = self.admin()?;
        for user in &self.options.users {
            self.make_user(&mut admin, user)?;
        }
        Ok(())
    }

    /// Makes one account; `cyrus` may administer its mailboxes.
    pub fn make_user(&self, admin: &mut Imap, login: &str) -> anyhow::Result<()> {
        let inbox = super::imap::quote(&self.names().external(&self.names().inbox(login)));
        admin.ok(format!("CREATE {inbox}"))?;
        admin.ok(format!("SETACL {inbox} {ADMIN} lrswipkxtecda"))?;
        Ok(())
    }

    pub fn base(&self) -> &Path {
        self.base.path()
    }

    pub fn conf(&self) -> PathBuf {
        self.base().join("imapd.conf")
    }

    /// Accounts named in the options.
    pub fn users(&self) -> &[String] {
        &self.options.users
    }

    /// Where its sync_server listens.
    pub fn csync(&self) -> SocketAddr {
        self.socket_address(CSYNC)
    }

    /// The URL under which spooltap replicates to this server; the password is `PASSWORD`.
    pub fn url(&self) -> String {
        format!("csync://{REPLICATOR}@{}", self.csync())
    }

    /// Where its imapd listens.
    pub fn imap_address(&self) -> SocketAddr {
        self.socket_address(IMAP)
    }

    /// How this server writes names.
    pub fn names(&self) -> Names {
        let settings = self.settings();
        let get = |key: &str| settings.get(key).map(String::as_str).unwrap_or_default();
        Names {
            unix: get("unixhierarchysep") == "yes",
            domains: !matches!(get("virtdomains"), "" | "off" | "no"),
            default_domain: get("defaultdomain").to_owned(),
        }
    }

    /// What its imapd greets with, `3.0.18` for example.
    pub fn release(&self) -> anyhow::Result<String> {
        let mut greeting = [0; 1024];
        let mut stream = TcpStream::connect(self.imap_address())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let count = std::io::Read::read(&mut stream, &mut greeting)?;
        let greeting = super::imap::text(&greeting[..count]);
        let (_, release) = greeting.split_once(" Cyrus IMAP ").with_context(|| greeting.clone())?;
        let release = release.trim_start_matches(|c: char| !c.is_ascii_digit());
        Ok(release.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect())
    }

    pub fn imap(&self, login: &str) -> anyhow::Result<Imap> {
        Imap::login(self.socket_address(IMAP), login, PASSWORD)
    }

    pub fn admin(&self) -> anyhow::Result<Imap> {
        self.imap(ADMIN)
    }

    pub fn lmtp(&self) -> anyhow::Result<Lmtp> {
        Lmtp::connect(&self.base().join("conf/socket/lmtp"))
    }

    pub fn sieve(&self, login: &str) -> anyhow::Result<Sieve> {
        Sieve::login(self.socket_address(SIEVE), login, PASSWORD)
    }

    /// Runs one of Cyrus's tools with this server's configuration, as its user.
    pub fn tool(&self, name: &str, arguments: &[&str]) -> anyhow::Result<Output> {
        Ok(self.tool_command(name, arguments).output()?)
    }

    /// The same, to be started by the caller.
    pub fn tool_command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program(name));
        command.arg("-C").arg(self.conf()).args(arguments).stdin(Stdio::null()).current_dir(self.base());
        as_cyrus(&mut command);
        command
    }

    /// Starts one of Cyrus's tools that goes on until it is dropped.
    pub fn background(&self, name: &str, arguments: &[&str]) -> anyhow::Result<Group> {
        let mut command = Command::new(self.program(name));
        command.arg("-C").arg(self.conf()).args(arguments).current_dir(self.base());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Group::spawn(as_cyrus(&mut command))?)
    }

    /// Whether Cyrus's own check finds that the checksums stored in a mailbox are not those of its records: 3.6.1 counts
    /// them up and down with every change and now and then miscounts.
    pub fn miscounts(&self, mailbox: &str) -> anyhow::Result<bool> {
        let said = self.tool("reconstruct", &["-n", &self.names().external(mailbox)])?;
        Ok(super::imap::text(&said.stdout).contains("updating sync_crc"))
    }

    /// Changes options; they hold from the next start on, and for tools at once.
    pub fn set(&mut self, key: &str, value: impl ToString) -> anyhow::Result<()> {
        self.options.conf.insert(key.into(), value.to_string());
        self.write_conf()
    }

    /// Ends the server in good order.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut master) = self.master.take() else { return Ok(()) };
        master.signal(Signal::SIGTERM);
        let gone = eventually(Duration::from_secs(15), || {
            master.members().iter().all(|(_, name)| name == "master").then_some(())
        });
        // The master of 3.6.1 spins for ever now and then when one of its children had been killed before.
        eventually(Duration::from_millis(500), || master.ended());
        gone.ok_or_else(|| anyhow!("Cyrus did not stop"))
    }

    /// Kills every process of the server at once.
    pub fn kill9(&mut self) {
        self.master = None;
    }

    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        self.boot()
    }

    /// Kills every process of that name, `sync_server` for example, and says how many there were.
    pub fn kill_processes(&self, name: &str) -> usize {
        let members = self.master.iter().flat_map(Group::members);
        members.filter(|(pid, have)| have == name && kill(*pid, Signal::SIGKILL).is_ok()).count()
    }

    /// A program of this server's release.
    pub fn program(&self, name: &str) -> PathBuf {
        self.options.role.program(name)
    }

    fn socket_address(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.address, port))
    }

    /// All of imapd.conf.
    fn settings(&self) -> BTreeMap<String, String> {
        let user = user_name();
        let mut all: BTreeMap<String, String> = [
            ("configdirectory", "@BASE@/conf"),
            ("partition-default", "@BASE@/spool"),
            ("defaultpartition", "default"),
            ("sievedir", "@BASE@/sieve"),
            ("admins", "cyrus repl"),
            ("cyrus_user", &user),
            ("allowplaintext", "yes"),
            ("sasl_pwcheck_method", "auxprop"),
            ("sasl_auxprop_plugin", "sasldb"),
            ("sasl_sasldb_path", "@BASE@/sasldb2"),
            ("sasl_mech_list", "PLAIN LOGIN"),
            ("sasl_minimum_layer", "0"),
            ("servername", "lab.test"),
            ("defaultdomain", "lab.test"),
            ("altnamespace", "no"),
            ("unixhierarchysep", "no"),
            ("virtdomains", "off"),
            ("allowusermoves", "yes"),
            ("annotation_allow_undefined", "yes"),
            ("sendmail", "/bin/true"),
            ("lmtpsocket", "@BASE@/conf/socket/lmtp"),
            ("idlesocket", "@BASE@/conf/socket/idle"),
            ("notifysocket", "@BASE@/conf/socket/notify"),
            ("proc_path", "@BASE@/conf/proc"),
            ("mboxname_lockpath", "@BASE@/conf/lock"),
            ("master_pid_file", "@BASE@/conf/master.pid"),
            ("master_ready_file", "@BASE@/conf/master.ready"),
            ("sync_try_imap", "0"),
            ("sync_authname", REPLICATOR),
            ("sync_password", PASSWORD),
            ("sync_realm", "lab.test"),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
        all.extend(self.options.conf.clone());
        all.retain(|_, value| !value.is_empty());
        let base = self.base().to_string_lossy().into_owned();
        all.into_iter().map(|(key, value)| (key, value.replace("@BASE@", &base))).collect()
    }

    fn write_conf(&self) -> anyhow::Result<()> {
        let lines: String = self.settings().iter().map(|(key, value)| format!("{key}: {value}\n")).collect();
        fs::write(self.conf(), lines)?;
        let conf = self.conf();
        let program = |name: &str| format!("{} -C {}", self.program(name).display(), conf.display());
        let listen = |port: u16| format!("{}:{port}", self.address);
        let services = [
            ("imap", program("imapd"), listen(IMAP)),
            ("csync", program("sync_server"), listen(CSYNC)),
            ("sieve", program("timsieved"), listen(SIEVE)),
            ("lmtp", format!("{} -a", program("lmtpd")), format!("{}/conf/socket/lmtp", self.base().display())),
        ];
        let mut text = format!("START {{\n  recover cmd=\"{} -r\"\n}}\nSERVICES {{\n", program("ctl_cyrusdb"));
        for (name, command, listen) in services {
            text.push_str(&format!("  {name} cmd=\"{command}\" listen=\"{listen}\" prefork=0\n"));
        }
        text.push_str("}\nEVENTS {\n}\n");
        fs::write(self.base().join("cyrus.conf"), text)?;
        Ok(())
    }
}

/// The user whom Cyrus runs as: its own if we are root, else we ourselves.
fn user() -> Option<User> {
    User::from_name("cyrus").ok().flatten().filter(|_| nix::unistd::geteuid().is_root())
}

fn user_name() -> String {
    let own = || User::from_uid(nix::unistd::geteuid()).ok().flatten();
    user().or_else(own).map_or_else(|| "cyrus".into(), |user| user.name)
}

/// To be run as the user of Cyrus.
pub fn as_cyrus(command: &mut Command) -> &mut Command {
    // INTERNALDATE is shown in the zone of the server.
    command.env("TZ", "UTC");
    match user() {
        Some(user) => command.uid(user.uid.as_raw()).gid(user.gid.as_raw()),
        None => command,
    }
}

/// Makes Cyrus the owner of everything below `dir`.
pub fn give_to_cyrus(dir: &Path) -> anyhow::Result<()> {
    let Some(user) = user() else { return Ok(()) };
    for entry in walkdir::WalkDir::new(dir) {
        let entry = entry?;
        if !entry.file_type().is_symlink() {
            chown(entry.path(), Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
    }
    Ok(())
}

/// A loopback address that no other instance has: two bytes from our process id, one counted.
fn free_address() -> anyhow::Result<Ipv4Addr> {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    for _ in 0..250 {
        let address = Ipv4Addr::new(127, high.max(1), low, NEXT.fetch_add(1, Ordering::Relaxed));
        if [IMAP, CSYNC, SIEVE].iter().all(|&port| TcpListener::bind((address, port)).is_ok()) {
            return Ok(address);
        }
    }
    bail!("no loopback address is free")
}

/// Logins that exist, with their realms.
fn logins() -> Vec<(String, &'static str)> {
    let numbered = (1..=20).map(|number| format!("u{number}"));
    let named = [ADMIN, REPLICATOR, "jane.doe", "a_b-c"].into_iter().map(ToOwned::to_owned);
    let mut logins: Vec<_> = numbered.chain(named).map(|login| (login, "lab.test")).collect();
    logins.extend(["u1", "u2", "u3", "u5", "u50", "jane.doe"].map(|login| (login.to_owned(), "dom.test")));
    logins
}

/// The password database, made once for all servers of the process.
fn passwords() -> anyhow::Result<&'static [u8]> {
    static MADE: OnceLock<Result<Vec<u8>, String>> = OnceLock::new();
    let made = MADE.get_or_init(|| make_passwords().map_err(|error| format!("{error:#}")));
    made.as_deref().map_err(|error| anyhow!("{error}"))
}

fn make_passwords() -> anyhow::Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("sasldb2");
    for (login, realm) in logins() {
        let mut child = Command::new("saslpasswd2")
            .args(["-p", "-c", "-f"])
            .arg(&file)
            .args(["-u", realm, &login])
            .stdin(Stdio::piped())
            .spawn()
            .context("saslpasswd2 (package sasl2-bin)")?;
        std::io::Write::write_all(&mut child.stdin.take().context("stdin")?, PASSWORD.as_bytes())?;
        if !child.wait()?.success() {
            bail!("saslpasswd2 refuses {login}");
        }
    }
    Ok(fs::read(file)?)
}

#[test]
fn a_server_starts_stops_and_leaves_nothing() {
    if !installed() {
        return;
    }
    let mut server = CyrusServer::start(Options::new().users(&["u1", "jane.doe"])).expect("starts");
    assert!(server.imap("u1").expect("logs in").ok("SELECT INBOX").is_ok());
    assert!(
        server.lmtp().expect("connects").deliver(&["u1"], b"Subject: x\r\n\r\ny\r\n").expect("delivers")[0]
            .starts_with('2')
    );
    assert!(server.sieve("jane.doe").expect("logs in").list().expect("lists").is_empty());
    assert_eq!(server.imap("u1").expect("logs in").ok("SELECT INBOX").expect("selects").exists(), 1);
    assert_eq!(server.kill_processes("sync_server"), 0);
    let _sync = TcpStream::connect(server.csync()).expect("sync_server listens");
    eventually(Duration::from_secs(5), || (server.kill_processes("sync_server") == 1).then_some(())).expect("killed");
    server.restart().expect("restarts");
    assert_eq!(server.imap("u1").expect("logs in").ok("SELECT INBOX").expect("selects").exists(), 1);
    let group = server.master.as_ref().expect("runs").pid();
    let base = server.base().to_owned();
    drop(server);
    assert!(members(group).is_empty());
    assert!(!base.exists());
}

#[test]
fn a_wrong_checksum_is_found_by_cyrus_itself() {
    if !installed() {
        return;
    }
    let mut server = CyrusServer::start(Options::new().set("unixhierarchysep", "yes").users(&["u1"])).expect("starts");
    let dir = server.tool("mbpath", &["user/u1"]).expect("runs").stdout;
    let index = Path::new(super::imap::text(&dir).trim()).join("cyrus.index");
    assert!(!server.miscounts("user.u1").expect("runs"));
    server.stop().expect("stops");
    // Index version 17: the checksum of annotations at 120, the CRC-32 of the header at 156, both big-endian.
    let mut bytes = fs::read(&index).expect("reads");
    bytes[123] ^= 1;
    let crc = crc32fast::hash(&bytes[..156]).to_be_bytes();
    bytes[156..160].copy_from_slice(&crc);
    fs::write(&index, bytes).expect("writes");
    assert!(server.miscounts("user.u1").expect("runs"));
}
